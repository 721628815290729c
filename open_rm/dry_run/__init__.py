"""What a run would do, said without weights or a GPU: --dry_run.

telling        everything below for one command line, as text and as plan.json
told           what a room says: lines for people and numbers for plan.json; how both are written
target         which devices are planned for: how many, with how much memory
sizes          the model's sizes, from its config alone
steps          the run's steps, dealt to all ranks as the run deals them
memory         a device's memory by part, and what is recomputed
alternatives   which DeepSpeed files would fit instead
hours          how long it takes, from a rate that was measured or given
disk           checkpoints and the final model
output_dir     what the run would make of its folder as it is
hub_and_wandb  what the Hub and wandb will say
"""
