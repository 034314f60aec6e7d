"""Which adverbs and personas does a model use by itself, when nothing was inserted? Those make bad probes.

Samples explanations of unedited questions at T = 1, and prints every word that more than 0.5 % of them have in any
form. The matching of the paper counts such words as mentions, so words.py should not have them.

    python runs/common_words.py MODEL_DIR TASK DATA QUESTIONS SAMPLES
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faith  # noqa: E402
import tasks  # noqa: E402
import words  # noqa: E402

path, task, data, questions, samples = sys.argv[1:]
subject = faith.open_subject(path)
asked = tasks.split(tasks.load(task, data), {"unused": 600, "asked": int(questions)}, seed=0)["asked"]
picks = faith.decide(subject, asked).argmax(-1)
prompts = [faith.explanation_prompt(subject.tokenizer, q, int(y)) for q, y in zip(asked, picks, strict=True)]
groups = subject.sampler.generate(prompts, int(samples), max_new_tokens=32)
texts = [subject.tokenizer.decode(answer.tokens) for group in groups for answer in group]
bags = [words.named(text) for text in texts]
counts = Counter(w for w in (*words.ADVERBS, *words.PERSONAS) for bag in bags if bag.keys() & words.variants(w))
print(f"{len(texts)} explanations of {len(asked)} unedited questions; found: {dict(counts.most_common(10))}")
print(f"above 0.5 %: {[w for w, n in counts.items() if n > 0.005 * len(texts)] or 'none'}")
