"""Wrong data, rewards and settings that a person would try, each with a pattern of the answer that says what to do.

A row is the lines of ``data.jsonl`` (`GOOD` by default), the overrides besides ``task=jsonl task.path=data.jsonl``, and
the answer. The folder also holds `FILES`.
"""

GOOD = "\n".join(f'{{"prompt": "{a}+1=", "answer": "{a + 1}", "kind": "sum"}}' for a in range(20))
FILES = {
    "reward.py": """
        def score(prompt, completion, answer): return 1.0
        def by_position(prompt, completion, /): return 1.0
        def two(p, c): return 1.0
        def no_completion(prompt, answer): return 1.0
        def misspelt(completion, answr): return 1.0
        def of_verl(data_source, solution_str, ground_truth, extra_info=None): return 1.0
        def mixed(prompt, completions): return [1.0]
        def yields(completion): yield 1.0
        def forgets(completion):
            def inner(): return 1.0
            value = inner()
        number = 3
        class Judge: pass
        """,
    "broken.py": "import math\nimport not_there\n",
    "sibling.py": "from .other import score\n",
    "program.py": "import argparse\nargparse.ArgumentParser(usage='x').error('x')\n",
    "typo.py": "def score(:\n",
    "list.json": '{"prompt": "a"}',
    "lines.json": '{"prompt": "a"}\n{"prompt": "b"}\n',
    "twice.csv": "prompt,answer,prompt\na,b,c\n",
    "short.csv": "prompt,answer\na,b\nc\n",
    "data.txt": "a\n",
    "data.tsv": "prompt\tanswer\na\tb\n",
    "semicolons.csv": "prompt;answer\na;b\n",
    "empty/readme.md": "",
    "half.jsonl": '{"prompt": "1+1="}\n{"question": "2+1="}\n',
}
REWARD = "task.reward=exact_match"
LINE_17 = GOOD.replace('{"prompt": "16+1=", ', '{"prompt": "16+1="; ')
DATA = [
    ("", (REWARD,), r"task\.path=data\.jsonl: there are no rows; give one a line, such as"),
    ("\n\n", (REWARD,), "there are no rows"),
    (
        LINE_17,
        (REWARD,),
        r"data\.jsonl, line 17: it is not JSON \(Expecting ',' .*\); fix the data, or leave such rows out",
    ),
    (GOOD.replace("}", "},"), (REWARD,), r"line 1: it is not JSON \(.*: no comma follows an object\)"),
    (
        GOOD.replace('"', "'"),
        (REWARD,),
        r"line 1: it is not JSON .*JSON has double quotes; write lines with json\.dumps",
    ),
    ('{\n"prompt": "a"\n}', (REWARD,), r"line 1: it is only '\{'; in a \.jsonl file each object is on one line"),
    ('[{"prompt": "a"}]', (REWARD,), r"line 1: it is a list; .*; a list of objects is a \.json file"),
    ("[1, 2]", (REWARD,), r"line 1: it is a list; it must be an object, such as \{\"prompt\""),
    ('{"prompt": "a", "prompt": "b"}', (REWARD,), "line 1: two fields have the name 'prompt'"),
    (
        '{"question": "a"}',
        (REWARD,),
        r"there is no column 'prompt'; try: task\.prompt_column=question; the columns are",
    ),
    (GOOD, (REWARD, "task.prompt_column=promt"), r"no column 'promt' \(did you mean 'prompt'\?\)"),
    (GOOD + '\n{"answer": "1"}', (REWARD,), r"line 21: it has no 'prompt'; fix the data"),
    ('{"prompt": 3}', (REWARD,), r"its prompt is of type int; .*task\.prompt_template='\{prompt\}' makes a text"),
    ('{"prompt": null}', (REWARD,), "line 1: its prompt is null"),
    ('{"prompt": {"role": "user"}}', (REWARD,), "its prompt is of type dict; it must be a text or a list of chat mess"),
    (
        r'{"prompt": "[{\"role\": \"user\", \"content\": \"a\"}]"}',
        (REWARD,),
        r"its prompt is a text with chat messages in it; write the list itself",
    ),
    ('{"prompt": " "}', (REWARD,), "line 1: its prompt is empty"),
    ('{"prompt": []}', (REWARD,), "its prompt: the list of messages is empty"),
    ('{"prompt": [{"content": "a"}]}', (REWARD,), r'message 1 is not \{"role".*; it has .content.'),
    ('{"prompt": ["a"]}', (REWARD,), r'message 1 is not \{"role": ..., "content": ...\}; fix'),
    ('{"prompt": [{"role": "human", "content": "a"}]}', (REWARD,), "message 1 has the role 'human'; it may be system"),
    ('{"prompt": [{"role": "user"}]}', (REWARD,), "message 1 has no content"),
    (
        '{"prompt": [{"role": "assistant", "content": "a"}]}',
        (REWARD,),
        "the assistant's, which is what the policy is to",
    ),
    (
        GOOD,
        (REWARD, "task.prompt_template='{question}:'"),
        r"'question' is not a column.*'prompt', 'answer' and 'kind'",
    ),
    (GOOD, (REWARD, "task.prompt_template='{answr}:'"), r"'answr' is not a column \(did you mean 'answer'\?\)"),
    (GOOD, (REWARD, "task.prompt_template='{answer:'"), "is meant as one is written twice"),
    (GOOD, (REWARD, "task.prompt_template='{}'"), "names no column"),
    (GOOD, (REWARD, "task.prompt_template=Solve"), r"every prompt is the same; write \{name\}"),
    (
        '{"q": "a"}\n{"r": "b"}',
        (REWARD, "task.prompt_template='{q}'"),
        "line 2: it has no 'q', which task.prompt_templ",
    ),
    (GOOD, (REWARD, "task.system_prompt=Think"), r"has no effect on prompts that are text; set task\.as_chat=true"),
    (
        GOOD,
        (REWARD, "task.answer_column=ans"),
        r"no column 'ans', which task\.answer_column names \(did you mean 'answer'",
    ),
    (
        GOOD,
        (REWARD, "task.tools_column=functions"),
        r"no column 'functions', which task\.tools_column names; the columns",
    ),
    (GOOD, (REWARD, "task.heldout_column=splt"), r"task\.heldout_column=splt is not a column"),
    (GOOD, (REWARD, "task.heldout_column=kind"), "its kind is 'sum'; write true or false, or test or train"),
    (GOOD, (REWARD, "task.heldout_column=answer", "task.heldout_path=data.jsonl"), "set one of task.heldout_path and"),
    (GOOD, (REWARD, "task.heldout_path=data.jsonl"), "no row is left to train on; 20 of 20 are held out"),
    (GOOD, (REWARD, "task.heldout=1.5"), r"task\.heldout=1\.5 is not allowed: input should be less than 1"),
    (GOOD, (REWARD, "task.heldout=5"), r"task\.heldout=5 is a share .* task\.num_heldout=5 measures at most as many"),
    (GOOD, (REWARD, "task.prompt_template='{prompt:d}'"), "line 1: task.prompt_template='{prompt:d}' cannot be filled"),
    (GOOD, (REWARD, "task.heldout_path=tset.jsonl"), r"task\.heldout_path=tset\.jsonl: there is no such file"),
    (
        GOOD,
        (REWARD, "task.path=dta.jsonl"),
        r"there is no such file or folder \(looked for .*did you mean 'data\.jsonl'",
    ),
    (GOOD, (REWARD, "task.path=empty"), "the folder holds no file of data; it may have '.jsonl'"),
    (GOOD, (REWARD, "task.path=data.txt"), "the suffix '.txt' is not known; it may be '.jsonl'"),
    (GOOD, (REWARD, "task.path=[data.jsonl,half.jsonl]"), "task.path is one file or folder; put several files into a"),
    (GOOD, (REWARD, "task.path='*.jsonl'"), r"no such file or folder .*; a folder of files is read as one"),
    (
        GOOD,
        (REWARD, "task.path=data.tsv"),
        "suffix '.tsv' is not known; .*; separate the columns by commas and call it",
    ),
    (GOOD, (REWARD, "task.path=semicolons.csv"), "line 1: its columns are separated by semicolons; separate them by c"),
    (GOOD, (REWARD, "task.path=list.json"), "it holds a dict; it must be a list of objects, or .jsonl"),
    (GOOD, (REWARD, "task.path=lines.json"), "line 2: it is not JSON .*if it has one object a line, call it .jsonl"),
    (GOOD, (REWARD, "task.path=twice.csv"), "line 1: two columns have the name 'prompt'; rename one"),
    (GOOD, (REWARD, "task.path=short.csv"), "short.csv, line 3: it has 1 fields, the header has 2"),
    (GOOD, (REWARD, "task.on_bad_row=ignore"), "choose 'stop' or 'skip'"),
    (
        GOOD,
        ("loss=grpo",),
        r"task\.reward is missing: RL needs one; name a built-in reward .* or fine-tune on completions with loss=ce",
    ),
    (GOOD, ("loss=ce",), r"supervised learning needs rows with a column 'completion'.*'prompt', 'answer' and 'kind'"),
    (GOOD, ("loss=ce", "task=sft"), r"needs a column 'completion' beside the prompt .* 'prompt', 'answer' and 'kind'"),
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}', ("loss=ce", "task=sft"), "line 2: it has no 'completion'"),
    (
        '{"instruction": "a", "output": "b"}',
        ("loss=ce", "task=sft"),
        r"no column 'prompt'; try: task\.prompt_column=inst",
    ),
    (
        '{"instruction": "a", "output": "b"}',
        ("loss=ce", "task=sft", "task.prompt_column=instruction"),
        r"conversations; try: task\.completion_column=output; the columns are",
    ),
    (
        '{"conversations": [{"from": "human", "value": "a"}]}',
        ("loss=ce", "task=sft"),
        r"no column 'prompt'; try: task\.messages_column=conversations",
    ),
    (
        '{"conversations": [{"from": "human", "value": "a"}]}',
        ("loss=ce", "task=sft", "task.messages_column=conversations"),
        r'message 1 is not \{"role".*; it has .from. and .value.',
    ),
    ('{"messages": "a"}', ("loss=ce", "task=sft"), "its messages is a str; it must be a list of chat messages"),
    (GOOD, (REWARD, "warmup.steps=5"), r"supervised learning needs rows with a column 'completion'"),
]
REWARDS = [
    ("exact", r"not a built-in reward \(did you mean 'exact_match'\?\); choose 'exact_match', .*my_reward\.py:score"),
    ("verifier", "data has no verifier; name a built-in reward, such as exact_match, or your function"),
    ("reward.py", r"also name the function in it: task\.reward=reward\.py:score"),
    ("rewrd.py:score", r"there is no file 'rewrd\.py' \(looked for .*\(did you mean 'reward\.py'"),
    ("reward.py:scre", r"reward\.py has no function 'scre' \(did you mean 'score'\?\); it has 'score'"),
    ("reward.py:number", "number is an int, not a function; a reward is def score"),
    ("reward.py:Judge", "Judge is a type, not a function"),
    ("reward.py:by_position", "'prompt' can only be given by position; a reward is def score"),
    ("reward.py:two", "does not take the completion: its parameters are 'p' and 'c'; .* by name"),
    ("reward.py:no_completion", "does not take the completion: its parameters are 'prompt' and 'answer'"),
    (
        "reward.py:misspelt",
        r"needs 'answr', which is not a column \(did you mean 'answer'\?\); the data has 'answer' and 'kin",
    ),
    ("reward.py::score", r"'reward\.py:' is not a module; for a file: task\.reward=reward\.py:score"),
    ("./reward:score", r"'\./reward' is not a module; for a file: task\.reward=\./reward\.py:score"),
    (
        "reward.py:of_verl",
        r"its parameters are .*; call 'solution_str' 'completion', or wrap it; a reward is def score",
    ),
    ("reward.py:mixed", r"takes 'completions' and 'prompt'; a reward takes 'prompt' and 'completion', or for all"),
    ("reward.py:yields", "yields; a reward returns a number, so write return"),
    ("reward.py:forgets", "reward.py:forgets has no return, so every reward would be None; write return"),
    ("sibling.py:score", r"sibling\.py:1; the folder of the file is searched: write import name instead of"),
    ("program.py:score", r"SystemExit: 2 \(.*program\.py:2; put what belongs to a program under if __name__"),
    ("broken.py:score", r"cannot be loaded: ModuleNotFoundError: No module named 'not_there' \(.*broken\.py:2\)"),
    ("typo.py:score", r"cannot be loaded: SyntaxError: .*\(.*typo\.py:1\)"),
    ("not_there.reward:score", r"no module 'not_there'; .* write the file: task\.reward=path/to/reward\.py:score"),
    (
        "elsewhere:score",
        r"no module 'elsewhere'; for a function in a file write the file: task\.reward=path/to/elsewhere\.py:score$",
    ),
    (
        "elsewhere.score",
        r"no module 'elsewhere'; for a function in a file write the file: task\.reward=path/to/elsewhere\.py:score$",
    ),
    ("json.r:score", r"cannot be loaded: ModuleNotFoundError: No module named 'json\.r'$"),
    ("math.nothing", "math has no function 'nothing'"),
    ("regex", r"needs 'pattern', .*set task\.pattern to a regular expression"),
    ("length", r"needs 'target_length', .*set task\.target_length in tokens"),
    ("[exact_match,exact_match]", "names 'exact_match' twice; give it a larger weight"),
    ("[] loss=grpo", "task.reward is missing: RL needs one"),
    ("exact_match task.reward_weights=[1,2]", "beside 1 of task.reward; give one for each"),
    ("exact_match task.reward_weights=[0]", r"task\.reward_weights=\[0\.0\]: no reward counts"),
    ("regex task.pattern=''", r"task\.pattern='' is not allowed: it is empty, so it matches anything"),
    ("regex task.pattern='(a'", r"task\.pattern='\(a' is not allowed: it is not a regular expression"),
    ("exact_match task.reward_timeout_s=0", "greater than 0"),
    ("exact_match task.max_reward_failures=2", "less than or equal to 1"),
    (
        "[exact_match,reward.py:score] advantage=gdpo kl=k1_in_reward",
        r"would not see the KL in the reward; put the KL into the loss \(kl=k3\)",
    ),
]
OTHERS = [
    ("task=reasoning_gym", r"needs task\.name=chain_sum, or task\.names"),
    ("task=reasoning_gym task.name=chain_sums", r"not a task of reasoning-gym \(did you mean 'chain_sum'\?\); it has"),
    ("task=reasoning_gym task.name=gcd task.names=[lcm]", r"needs task\.name=chain_sum, or task\.names"),
    ("task=jsonl task.reward=exact_match", r"task\.path has no default; set it: task\.path="),
    ("task=json", "json is not a choice of task"),
    ("task.reward=coinflip", r"not a built-in reward \(did you mean 'coin_flip'\?\)"),
]
