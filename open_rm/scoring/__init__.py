"""A trained reward model opened, without DeepSpeed, and what is done with its rewards.

python -m open_rm.scoring score | best_of_n | pairs --model DIR --input FILE --output FILE.jsonl

opening        what a user named: ours, an adapter, somebody's classifier; or one sentence that says why not
scorer         the open model: texts or conversations to token ids, token ids to rewards
folders        the model's folder: found on the disk or fetched from the Hub; its fingerprint
planning       which sequences are computed together: shared prompts, micro-batches
open_model     the model in memory: a micro-batch in, rewards out
computing      micro-batches on one device, and how many positions it holds
processes      worker processes, each with a model of its own
selection      what is made of scored answers: the n best of a row, preference pairs, their lengths balanced
pair_rows      two scored answers as a row of preference data, in our form or TRL's
agreement      how far two reward models agree on a file's answers
blocks         rows of a file to token ids, a block at a time
streams        rows in, rewards beside them, rows out: in order, in bounded memory, resumable
output         a file that appears whole, and whose making goes on where it was killed
lines          rows as lines of strict JSON
scores         a row as it was, with its rewards
arguments      the flags of the commands
showing        how far a stream is: a bar, or a line now and then
"""
