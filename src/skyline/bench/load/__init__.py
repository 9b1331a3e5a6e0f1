"""The load generator: sends requests at the asked pace, notes when tokens arrive, and watches itself while doing so.

arrivals.py     when requests should start (pure)
prompts.py      texts of exact numbers of tokens that no prefix cache has seen
http.py         HTTP/1.1 and server-sent events with little time spent for each token
worker.py       a process that sends its share of the load
processes.py    the worker processes as the one that started them sees them
generator.py    a load from its plan on: sets up the workers, decides when there is enough
observed.py     what the workers noted, put together
null_server.py  a server that does nothing, to measure the client with
"""
