"""The load generator: sends requests at the asked pace, notes when tokens arrive, and watches itself while doing so.

arrivals.py     when requests should start (pure)
prompts.py      texts of exact numbers of tokens that no prefix cache has seen
http.py         HTTP/1.1 and server-sent events with little time spent for each token
worker.py       a process that sends its share of the load
generator.py    starts the workers, decides when to stop, puts their notes together
null_server.py  a server that does nothing, to measure the client with
"""
