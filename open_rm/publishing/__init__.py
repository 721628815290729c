"""Save, prove, describe, push.

run_folder       the run's name, folder and repository: claimed before, run.json after
saving           the folder that any client reads
tokenizer_files  its tokenizer
clients          what each client of the folder makes of it: its own way to token ids
proof            clients get our token ids and our rewards from it
card             the model card
hub_calls        calls to the Hub that are repeated, and what went wrong as a clause
pushing          a push to the Hub that cannot lose a model
pulling          a model from the Hub, whole or not there
"""
