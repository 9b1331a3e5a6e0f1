"""The page of results: live beside a running benchmark, or a folder of files that works without a server.

data.py      runs as the JSON that the page shows       app.py      serves the page and its data on this machine
frontier.py  who is on the frontier, what changed       export.py   writes the same page as a static site
redact.py    keeps keys out of what is published        bundle.py   the page's modules as one script
assets/      the page: HTML, CSS and plain JavaScript
"""
