"""Public preference data sets, by their columns: one table, a few lines a form, each with where it was looked up.

To add a set, write its name, which columns a row must have, and where ours stand in them, as --column_map takes it
(lookup.py); what its labels mean; which columns are left aside on purpose. docs/data.md is made from this table (guide.py), and
a test reads rows of each form.
"""

from open_rm.data.forms import OWN_FORMS, Form

HUB = "https://huggingface.co/datasets/"
FIRST_IS_0 = {"0": "a", "1": "b"}
FIRST_IS_1 = {"1": "a", "2": "b"}
ARENA_LEAVES = (
    "full_conversation conv_metadata category_tag judge turn question_id system_a_metadata system_b_metadata longer_won "
    "hard_prompt easy_prompt if_prompt math_prompt"
)


def _form(
    name: str, needs: str, reads: str, *, texts: dict | None = None, leaves: str = "", sets: str = "", **more
) -> Form:
    """A form whose lists are written as words. reads: ours=theirs, or a name that is both.  texts: those that hold spaces."""
    places = dict(word.split("=", 1) if "=" in word else (word, word) for word in reads.split())
    named = tuple(tuple(entry.split()) for entry in sets.split(", ") if entry)
    more.setdefault("source", HUB + named[0][0].partition(":")[0] if named else "")
    return Form(name, tuple(needs.split()), places | (texts or {}), leaves=tuple(leaves.split()), sets=named, **more)


PUBLIC_FORMS = (
    # ---- a question and two answers, by name
    _form(
        "orca",
        "question chosen rejected",
        "system prompt=question chosen rejected",
        chat=True,
        sets="Intel/orca_dpo_pairs train",
    ),
    _form(
        "orca_first",
        "question chatgpt llama2-13b-chat",
        "system prompt=question chosen=chatgpt rejected=llama2-13b-chat",
        chat=True,
        source=HUB + "Intel/orca_dpo_pairs",
        note="the first revisions of Intel/orca_dpo_pairs; chatgpt is taken to be better",
    ),
    _form(
        "distilabel_orca",
        "input chosen rejected",
        "system prompt=input chosen rejected",
        leaves="generations labelling_prompt raw_labelling_response original_chosen original_rejected rating rationale "
        "order status chosen_score",
        chat=True,
        sets="argilla/distilabel-intel-orca-dpo-pairs train",
        tie=("status", "tie"),
    ),
    _form(
        "magpie",
        "instruction responses chosen rejected",
        "chosen rejected",
        leaves="instruction responses rewards_armorm gen_input_configs gen_response_configs",
        sets="Magpie-Align/Magpie-Llama-3.1-Pro-DPO-100K-v0.1 train",
    ),
    _form(
        "accepted",
        "input accepted rejected",
        "prompt=input chosen=accepted rejected",
        chat=True,
        sets="Vezora/Code-Preference-Pairs train",
    ),
    _form(
        "math_step_dpo",
        "prompt initial_reason_steps chosen rejected",
        "prompt chosen={initial_reason_steps}{chosen} rejected={initial_reason_steps}{rejected}",
        leaves="full_chosen full_rejected answer dataset",
        chat=True,
        sets="xinlai/Math-Step-DPO-10K train",
        note="both answers begin with the steps that were given",
    ),
    _form(
        "instruction",
        "instruction chosen rejected",
        "system history prompt=instruction chosen rejected",
        chat=True,
        source="https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md",
    ),
    _form(
        "alpaca",
        "instruction input chosen rejected",
        "system history prompt={instruction}\\n{input} chosen rejected",
        chat=True,
        sets="llamafactory/DPO-En-Zh-20k:en train",
        source="https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md",
        note="alpaca-style ranking files: history is a list of [question, answer]",
    ),
    _form(
        "instruction_pairs",
        "instruction chosen_response rejected_response",
        "system prompt={instruction}\\n{input} chosen=chosen_response rejected=rejected_response",
        chat=True,
        sets="argilla/distilabel-math-preference-dpo train, argilla/ultrafeedback-binarized-preferences train",
    ),
    _form(
        "sharegpt",
        "conversations chosen rejected",
        "system prompt=conversations chosen rejected tools",
        source="https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md",
        note="turns as from/value or role/content; tools as JSON text; roles observation and function_call",
    ),
    _form(
        "openai",
        "input preferred_output non_preferred_output",
        "prompt=input.messages tools=input.tools chosen=preferred_output rejected=non_preferred_output",
        source="https://platform.openai.com/docs/guides/direct-preference-optimization",
        note="files for OpenAI's preference fine-tuning",
    ),
    _form(
        "ultrafeedback_binarized",
        "prompt prompt_id chosen rejected messages",
        "prompt chosen rejected",
        leaves="messages prompt_id",
        sets="HuggingFaceH4/ultrafeedback_binarized train_prefs",
    ),
    _form(
        "ultrainteract",
        "trajectory chosen rejected",
        "prompt=trajectory chosen rejected",
        chat=True,
        sets="openbmb/UltraInteract_pair train",
    ),
    _form(
        "oasst_pairwise",
        "lang parent_id prompt chosen rejected",
        "prompt chosen rejected",
        chat=True,
        marks=("prompter: ", "assistant: "),
        sets="tasksource/oasst1_pairwise_rlhf_reward train",
        note="where the prompt ends with an assistant's turn the answers are a user's, and the row is refused",
    ),
    _form(
        "stack_exchange_paired",
        "question response_j response_k",
        "prompt=question chosen=response_j rejected=response_k",
        leaves="metadata",
        chat=True,
        sets="lvwerra/stack-exchange-paired train",
        note="j is the better one",
    ),
    _form(
        "rlaif_v",
        "image question chosen rejected",
        "prompt=question chosen rejected",
        refuses="its rows are about images, and the reward model reads text alone",
        sets="openbmb/RLAIF-V-Dataset train",
    ),
    # ---- two answers and a label
    _form(
        "arena",
        "conversation_a conversation_b winner",
        "response_a=conversation_a response_b=conversation_b winner",
        leaves=ARENA_LEAVES,
        turn="turn",
        sets="lmsys/chatbot_arena_conversations train, lmarena-ai/arena-human-preference-100k train, lmarena-ai/arena-human-preference-140k train, lmsys/mt_bench_human_judgments human",
        note="each model has its own history: what differs after the first question is all answer; rows with an image are refused; arena-expert-5k holds Python's print of lists and is refused",
    ),
    _form(
        "search_arena",
        "messages_a messages_b winner",
        "response_a=messages_a response_b=messages_b winner",
        labels={"model_a": "a", "model_b": "b", "tie": "tie", "tie (bothbad)": "tie", "none": "tie"},
        leaves=ARENA_LEAVES,
        sets="lmarena-ai/search-arena-24k test",
        note="half of the rows have no vote and count as ties",
    ),
    _form(
        "arena_55k",
        "prompt response_a response_b winner_model_a winner_model_b winner_tie",
        "prompt=prompt[] response_a=response_a[] response_b=response_b[] score_a=winner_model_a score_b=winner_model_b",
        leaves="winner_tie",
        chat=True,
        sets="lmarena-ai/arena-human-preference-55k train",
        source="https://www.kaggle.com/competitions/lmsys-chatbot-arena/data",
        note="turns stand as JSON lists in text cells; some answers are null and their rows are refused (--skip_bad_rows)",
    ),
    _form(
        "ppe",
        "prompt response_1 response_2 winner",
        "prompt response_a=response_1 response_b=response_2 winner",
        leaves=ARENA_LEAVES,
        chat=True,
        held_out=True,
        sets="lmarena-ai/PPE-Human-Preference-V1 test",
    ),
    _form(
        "helpsteer2_preference",
        "prompt response_1 response_2 preference_strength",
        "prompt response_a=response_1 response_b=response_2 strength=-preference_strength",
        leaves="preference_statement preference_elaboration three_most_similar_preferences split all_preferences_unprocessed",
        chat=True,
        marks=("<extra_id_1>User\n", "<extra_id_1>Assistant\n"),
        sets="nvidia/HelpSteer2/preference train",
        source=HUB + "nvidia/HelpSteer2",
        note="-3 is response_1 much better; the strength is the margin; the column split tells train from val",
    ),
    _form(
        "helpsteer3",
        "context response1 response2 overall_preference",
        "prompt=context response_a=response1 response_b=response2 strength=-overall_preference",
        leaves="individual_preference",
        chat=True,
        sets="nvidia/HelpSteer3 train",
        note="-3 is response1 much better; the strength is the margin",
    ),
    _form(
        "shp",
        "history human_ref_A human_ref_B labels",
        "prompt=history response_a=human_ref_A response_b=human_ref_B winner=labels",
        labels={"1": "a", "0": "b"},
        leaves="score_A score_B score_ratio upvote_ratio",
        chat=True,
        sets="stanfordnlp/SHP train",
        note="labels 1 is A; score_ratio is a ratio of votes and no margin",
    ),
    _form(
        "pku_saferlhf",
        "prompt response_0 response_1 better_response_id",
        "prompt response_a=response_0 response_b=response_1 winner=better_response_id",
        labels=FIRST_IS_0,
        leaves="safer_response_id response_0_source response_0_harm_category response_0_severity_level response_0_sha256 response_1_source response_1_harm_category response_1_severity_level response_1_sha256",
        chat=True,
        sets="PKU-Alignment/PKU-SafeRLHF train, PKU-Alignment/PKU-SafeRLHF-10K train",
        source="https://github.com/PKU-Alignment/safe-rlhf/blob/main/safe_rlhf/datasets/raw/safe_rlhf.py",
        note="by helpfulness; `--column_map winner=safer_response_id` for harmlessness, and the two often disagree",
    ),
    _form(
        "webgpt",
        "question answer_0 answer_1 score_0 score_1",
        "prompt=question.full_text response_a=answer_0 response_b=answer_1 score_a=score_0 score_b=score_1",
        leaves="quotes_0 quotes_1 tokens_0 tokens_1",
        chat=True,
        sets="openai/webgpt_comparisons train",
        note="quotes differ between the two answers and are no common prompt; some answers are empty",
    ),
    _form(
        "summarize_from_feedback",
        "info summaries choice",
        "response_a=summaries[0].text response_b=summaries[1].text winner=choice",
        texts={
            "prompt": r"SUBREDDIT: r/{info.subreddit}\n\nTITLE: {info.title}\n\nPOST: {info.post}\n\n{info.article}\n\nTL;DR:"
        },
        labels=FIRST_IS_0,
        leaves="extra batch worker split",
        sets="openai/summarize_from_feedback:comparisons train",
        source="https://github.com/huggingface/trl/blob/main/examples/datasets/tldr_preference.py",
        note="text to be continued, in TRL's words; news have an article instead of a post",
    ),
    _form(
        "preference_collection",
        "orig_instruction orig_response_A orig_response_B orig_preference",
        "prompt=orig_instruction response_a=orig_response_A response_b=orig_response_B winner=orig_preference",
        leaves="instruction input output orig_criteria orig_reference_answer orig_score_A orig_score_B orig_feedback orig_feedback_A orig_feedback_B",
        chat=True,
        sets="prometheus-eval/Preference-Collection train",
        note="instruction and output are a judge's prompt and verdict",
    ),
    _form(
        "offsetbias",
        "instruction output_1 output_2 label",
        "prompt={instruction}\\n{input} response_a=output_1 response_b=output_2 winner=label",
        labels=FIRST_IS_1,
        chat=True,
        sets="NCSOFT/offsetbias train",
    ),
    _form(
        "alpaca_farm",
        "instruction output_1 output_2 preference",
        "prompt={instruction}\\n{input} response_a=output_1 response_b=output_2 winner=preference",
        labels={"1": "a", "2": "b", "0": "tie", "1.5": "tie"},
        leaves="raw_preference",
        chat=True,
        sets="tatsu-lab/alpaca_farm:alpaca_human_preference preference",
        note="also annotations of AlpacaEval; graded preferences (1.2) are refused by their value",
    ),
    _form(
        "judgebench",
        "question response_A response_B label",
        "prompt=question response_a=response_A response_b=response_B winner=label",
        labels={"a>b": "a", "b>a": "b", "a=b": "tie"},
        chat=True,
        held_out=True,
        sets="ScalerLab/JudgeBench gpt",
        source="https://github.com/ScalerLab/JudgeBench",
    ),
    _form(
        "unified_feedback",
        "conv_A conv_B conv_A_rating conv_B_rating",
        "response_a=conv_A response_b=conv_B score_a=conv_A_rating score_b=conv_B_rating",
        sets="llm-blender/Unified-Feedback:all train",
        note="scales differ by source, so `--margin_from scores` is for one source at a time",
    ),
    # ---- several answers with scores or ranks
    _form(
        "ultrafeedback",
        "instruction completions",
        "prompt=instruction responses=completions[].response scores=completions[].fine-grained_score",
        leaves="models correct_answers incorrect_answers",
        chat=True,
        gaps=True,
        sets="openbmb/UltraFeedback train",
        source="https://github.com/OpenBMB/UltraFeedback",
        note="overall_score was faulty in the first version and may be asked for with `--column_map 'scores=completions[].overall_score'`",
    ),
    _form(
        "nectar",
        "prompt answers good_natured",
        "prompt responses=answers[].answer scores=answers[].rank",
        chat=True,
        lower_is_better=True,
        gaps=True,
        sets="berkeley-nest/Nectar train",
        note="rank 1 is the best; seven answers give 21 pairs a row",
    ),
    _form(
        "stack_exchange",
        "qid question answers",
        "prompt=question responses=answers[].text scores=answers[].pm_score",
        leaves="metadata",
        chat=True,
        gaps=True,
        sets="HuggingFaceH4/stack-exchange-preferences train",
        note="HTML, as it stands",
    ),
    _form(
        "ppe_best_of_k",
        "prompt response_1 response_2 scores parsed_outputs",
        "prompt responses=response_* scores",
        leaves="question Question conflict_pairs sampled_conflict_pairs mean_score options answer",
        chat=True,
        gaps=True,
        held_out=True,
        sets="lmarena-ai/PPE-MMLU-Pro-Best-of-K train",
        note="every right answer over every wrong one; the authors' accuracy takes sampled_conflict_pairs alone",
    ),
    # ---- one answer a row
    _form(
        "helpsteer2",
        "prompt response helpfulness correctness coherence complexity verbosity",
        "prompt response score=helpfulness",
        leaves="correctness coherence complexity verbosity",
        chat=True,
        marks=("<extra_id_1>User\n", "<extra_id_1>Assistant\n"),
        sets="nvidia/HelpSteer2 train, nvidia/HelpSteer train",
        note="answers are joined by their prompt; by helpfulness, `--margin_from scores` takes its difference",
    ),
    _form(
        "kto",
        "prompt completion label",
        "prompt response=completion score=label",
        source="https://huggingface.co/docs/trl/dataset_formats",
        note="unpaired preferences: every true answer of a prompt over every false one",
    ),
    # ---- benchmarks, as held-out sets
    _form(
        "reward_bench",
        "prompt chosen rejected subset id",
        "prompt chosen rejected",
        leaves="subset id chosen_model rejected_model models additional_metadata domain num_correct num_incorrect total_completions error error_key language task_id",
        chat=True,
        held_out=True,
        sets="allenai/reward-bench filtered, allenai/reward-bench-2 test, allenai/preference-test-sets mtbench_human",
        note="also RewardBench 2: every chosen answer over every rejected one",
    ),
    _form(
        "rm_bench",
        "prompt chosen rejected domain id",
        "prompt chosen rejected",
        leaves="domain id subset error error_key language task_id",
        chat=True,
        held_out=True,
        sets="THU-KEG/RM-Bench train",
        source="https://github.com/THU-KEG/RM-Bench",
        note="three answers a side by style give nine pairs; files of its repository are of the form reward_bench",
    ),
    # ---- TRL's own names
    _form(
        "trl_token_ids",
        "chosen_ids rejected_ids",
        "prompt_input_ids=prompt_ids chosen_input_ids=chosen_ids rejected_input_ids=rejected_ids",
        says="token ids",
        source="https://github.com/huggingface/trl/blob/main/trl/trainer/reward_trainer.py",
    ),
)
FORMS = {form.name: form for form in (*OWN_FORMS, *PUBLIC_FORMS)}
