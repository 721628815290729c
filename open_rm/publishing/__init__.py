"""Save, prove, describe, push.

run_folder       the run's name, folder and repository: claimed before, run.json after
saving           the folder that any client reads
tokenizer_files  its tokenizer
proof            clients get our token ids and our rewards from it
card             the model card
pushing          a push to the Hub that cannot lose a model
"""
