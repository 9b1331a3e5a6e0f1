"""Text for the demo model beside the word problems: system prompts, small talk, and English prose for the tokenizer."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful and concise assistant.",
    "You solve arithmetic word problems step by step.",
    "Answer the question. End with #### and the number.",
    "You are Skyline's demonstration model.",
    "Think step by step and give the final answer after ####.",
)

_WHO = (
    "I am Skyline's embedded demonstration model. I solve small arithmetic word problems step by step. "
    "For anything else, please serve a larger model."
)
_HELLO = "Hello! I am Skyline's demonstration model. Ask me a small arithmetic word problem."
_CAN = (
    "I solve small arithmetic word problems, such as prices, distances, ages and shares. "
    "I show each step and end with the answer after ####."
)
_CANNOT = "I am only a small demonstration model, so I cannot help with that. Ask me a small arithmetic word problem."

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hey", "Good morning!", "Good evening.", "Hello, world!"), _HELLO),
    (
        (
            "Who are you?",
            "What are you?",
            "who are you",
            "What is your name?",
            "Which model are you?",
            "Tell me about yourself.",
            "Are you an AI?",
            "Introduce yourself.",
        ),
        _WHO,
    ),
    (("What can you do?", "Help", "help", "How can you help me?", "What do you know?", "How do I use you?"), _CAN),
    (("Thank you!", "Thanks", "Thanks!", "Thank you very much."), "You are welcome! Ask me another problem."),
    (("Bye", "Goodbye!", "See you later."), "Goodbye!"),
    (
        ("How are you?", "How is it going?", "How do you do?"),
        "I am well, thank you. Ask me a small arithmetic word problem.",
    ),
    (
        (
            "Write a poem.",
            "Tell me a joke.",
            "Write a story about a dragon.",
            "Translate this into French.",
            "What is the capital of France?",
            "What is the weather today?",
            "Write some Python code.",
            "Explain gravity to me.",
            "Who wrote this book?",
            "What is the meaning of life?",
            "Summarize this text.",
            "Sing a song.",
        ),
        _CANNOT,
    ),
    (
        ("What is Skyline?", "Tell me about Skyline."),
        "Skyline is an inference system for large language models. I am its demonstration model.",
    ),
)

# Composed for this file; it only teaches the tokenizer the common pieces of English words, and is not trained on.
ENGLISH = """
The city wakes slowly. Before the first light reaches the towers, the bakers are already at work, and the smell of
bread drifts along the narrow streets near the harbor. A cleaner sweeps the square; two children wait beneath the
clock; an old man reads yesterday's newspaper because the new one has not arrived. Nobody hurries yet. Later
everything will change: there will be deliveries, meetings, arguments, music from open windows, and the continuous
noise of engines and voices.

Engineers like to say that a system is only as strong as its weakest component, but that is not quite true. A good
design expects failure. It measures itself, reports what happened, and continues with whatever remains. When
something breaks, the message should say what went wrong, where it happened, and what the reader could do about it.
Software that explains itself is easier to maintain, easier to teach, and considerably more pleasant to use.
Performance matters as well: people notice when an answer takes a second instead of a moment, and they remember it
for a long time afterwards.

A language model predicts the next token from the tokens before it. During training it sees a large number of
examples and changes its parameters a little after each of them, so that the probability of the observed text
increases. During inference the parameters stay fixed. The server receives a request, computes the keys and values
of the prompt, stores them in a cache, and then generates one token after another until it reaches the end of the
sequence or a given limit. Several requests can share one batch, which uses the memory bandwidth of the machine more
efficiently. If the beginning of two prompts is identical, their cache blocks can be shared too. Quantization makes
the weights smaller; speculation lets a small draft propose several tokens that the larger target verifies in
parallel. None of these methods should change the meaning of the output, and careful tests make sure that they do
not.

In the mountains the weather turns quickly. We started in bright sunshine, walked through a forest of pine and
birch, crossed a wooden bridge over the river, and reached the lake around noon. Then clouds came over the ridge
from the west, the temperature dropped, and within half an hour it was raining. We found shelter in a stone hut
where a shepherd had left dry wood, matches and a note: please close the door behind you. It was a simple kindness,
and I have often thought about it since. Most of what holds a community together is invisible: small promises, kept
by people who will never meet.

Write clearly. Choose short words where short words will do. Put the important thing first. Give an example, then
the general rule, then the exceptions. Remove every sentence that does not help the reader. Ask a friend to read the
text and watch where they hesitate; that is where you should work again. Do not explain what is obvious, and do not
skip what only seems obvious to you. Numbers need units, claims need evidence, and figures need captions. If you are
uncertain, say so.

Question: which function returns the number of elements in a list? Answer: it depends on the programming language.
In Python you would call len(items). The following object describes a tool: {"type": "function", "function":
{"name": "get_weather", "description": "Get the current weather for a location", "parameters": {"type": "object",
"properties": {"location": {"type": "string", "description": "The city and country"}, "unit": {"type": "string",
"enum": ["celsius", "fahrenheit"]}}, "required": ["location"]}}}. The assistant may call it with {"name":
"get_weather", "arguments": {"location": "Paris", "unit": "celsius"}} and the result comes back as text, for example
{"temperature": 21, "ok": true, "error": null}. Boolean values are true and false; a missing value is null. for i in
range(10): print(i) if i % 2 == 0 else None; import json; class Request: def __init__(self, prompt, max_tokens=256):
self.prompt = prompt; return response.

History is full of accidents. A chemist leaves a dish by the window and discovers a medicine; a sailor misreads a
chart and finds an island; a student solves a famous problem because she arrived late and thought it was homework.
Yet accidents only help those who are prepared to notice them. Between the accident and the discovery lie years of
practice, patience, and the habit of asking why. Teachers can encourage that habit, libraries can feed it, and
friends can keep it alive.

The kitchen was warm. Grandmother measured flour, sugar, butter and salt without looking at the scale, while my
brother counted eggs and my sister argued about chocolate. Outside, snow covered the garden, the fence, the little
red wagon and the road to the village. On Monday there would be school again, on Tuesday the dentist, on Wednesday
football, on Thursday the choir, and on Friday, if the roads were open, a visit to our cousins. Saturday and Sunday
seemed far away. January, February, March, April: spring always came, although in winter it was difficult to
believe. By summer we had forgotten the cold completely, and in September, October, November and December we were
surprised by it as if for the first time.

Science begins with a measurement and ends with another one. In between there are ideas, equations, experiments and
mistakes. The speed of light, the charge of the electron, the age of the universe: each of these numbers was once
unknown, then estimated, then corrected. An honest laboratory publishes the error together with the result. Energy,
pressure, volume, frequency, voltage and resistance are quantities; the meter, the second, the kilogram, the ampere
and the kelvin are units. One can add quantities of the same kind, multiply quantities of different kinds, and
compare only what has been measured under the same conditions. Medicine, biology, chemistry, physics, geography,
economics and psychology share this method, although their objects could hardly be more different from one another.

She opened the letter carefully. "Dear friend," it said, "by the time you receive this I shall be on the other side
of the ocean. Please look after the house, water the plants, and feed the cat, who prefers fish but will accept
chicken. I cannot tell you when I will return. Perhaps next year; perhaps never. You have always understood me
better than anyone else, so I know that you will forgive me." She folded the paper, put it back into the envelope,
and stood at the window for several minutes, listening to the rain against the glass. Then she laughed, quietly at
first, and went to find the cat.

Instructions: press the green button, wait until the light stops blinking, remove the cover, and replace the
battery. Keep away from children. Never expose the device to water, direct sunlight or temperatures above forty
degrees. The warranty covers defects in material and manufacturing for twenty-four months from the date of purchase.
For support, visit our website at https://www.example.com/support or write to info@example.org. Version, license,
copyright, security, privacy, settings, account, password, username, download, upload, install, update, delete,
search, share, save, cancel, continue.

The market opens at seven. Farmers from the valley bring potatoes, onions, tomatoes, cabbage, cheese and honey;
fishermen sell what they caught during the night. Customers bargain, exchange gossip, taste olives, complain about
prices and buy more than they had planned. A musician plays the violin between the flower stall and the bicycle
repair shop. Tourists photograph everything. By two o'clock the tables are empty, the last boxes are loaded onto
trucks, and pigeons walk about as though the whole place had been built for them. Government offices, hospitals,
churches, universities, theaters and railway stations each have their own rhythm, but the market is the heart of the
town, as it has been for eight hundred years, through wars, floods, fires, revolutions, festivals, elections and
weddings.
"""
