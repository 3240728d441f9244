"""An endpoint of OpenAI's form that answers each request at a trade-off of its own.

`model.py` is what is served, `requests.py` what is asked, `rows.py` one answer in the making, `sampling.py` how its
tokens are chosen, `engine.py` the queue of rows that are answered together, `api.py` the paths, `answers.py` what they
give back, `server.py` the process. `mopl serve` starts it.
"""
