"""A trained reward model behind HTTP, in the forms that RL trainers already send.

python -m open_rm.serve --model DIR

A request passes through these rooms from top to bottom.

limits       the flags of the server, and how much it takes at a time; a refusal with its status and sentence
listening    the address, and the system's limit of connections
connections  connections, signals, draining: uvicorn with time limits before and between requests
application  paths, token, bodies, errors: one handler for every dialect
dialects     what each trainer sends and expects: body to texts, rewards to JSON
texts        texts, conversations and ids to the token ids of training; what was mended is counted
collector    requests that arrive together are scored together, in one thread
counters     what is counted and timed, for /metrics
"""
