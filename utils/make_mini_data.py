"""Write mini_data: a small closed world, told in documents, asked about in conversations, judged in preference pairs.

    python utils/make_mini_data.py                      # writes mini_data/, byte for byte the same each time

48 people, half of them Chinese, each with a city, a food, an animal and a number: 192 facts (utils/mini_world.yaml).
The layout and the columns are those of the big data sets, their quirks included: `id` is a number in sft/7M and a
string in sft/Gen, `label` is a struct in one file and null in the next, English documents lack some columns.

    pt/<industry>/<chinese|english>/high/*.parquet      documents; no two are alike
    sft/7M, sft/Gen                                     conversations about four fifths of the facts
    dpo/train-*, dpo/test-*                             a right answer against one that is wrong, about something
                                                        else, repeats itself or runs on
    eval/documents.parquet                              documents that stand nowhere in pt/
    eval/questions.jsonl                                group new_wording: facts that SFT asks about, in a wording it
                                                        never uses; group unasked_fact: facts it never asks about
    eval/choices.jsonl                                  the same facts as multiple choice: the right answer among
                                                        three with other values; `subject` is the group

mini_data/arena, questions for the web page, is written by hand and stays as it is.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

SEED = 20250218
NUM_STORIES = 4300  # per language, each about one person
NUM_LISTS = 320  # per language and attribute, each about four people
NUM_EVAL_STORIES = 100  # per language
NUM_SINGLE_TURN = 3000
NUM_MULTI_TURN = 750
NUM_DPO_TRAIN, NUM_DPO_TEST = 1600, 300
UNASKED_SHARE = 0.8  # of the people: one of their four facts is told in pt/ and asked in no row of sft/ or dpo/
INDUSTRIES = {
    "city": ("tourism_geography", "旅游_地理"),
    "food": ("accommodation_catering_hotel", "住宿_餐饮_酒店"),
    "animal": ("news_media", "新闻传媒"),
    "number": ("mathematics_statistics", "数学_统计"),
    "story": ("literature_emotion", "文学_情感"),
}
LANGUAGE_FOLDERS = {"en": "english", "zh": "chinese"}


class Fact(NamedTuple):
    language: str
    name: str
    attribute: str
    value: str
    asked: bool


def make_facts(world: dict[str, Any], rng: random.Random) -> list[Fact]:
    """Give every person one value of each attribute, and keep one fact of most people out of every question."""
    facts = []
    for language, words in world.items():
        for name in words["people"]:
            unasked = rng.choice(list(words["attributes"])) if rng.random() < UNASKED_SHARE else None
            for attribute, table in words["attributes"].items():
                facts.append(Fact(language, name, attribute, rng.choice(table["values"]), attribute != unasked))
    return facts


def tell(world: dict[str, Any], fact: Fact, rng: random.Random) -> str:
    telling = rng.choice(world[fact.language]["attributes"][fact.attribute]["tellings"])
    return rng.choice(world[fact.language]["links"]) + telling.format(name=fact.name, value=fact.value)


def answer(world: dict[str, Any], fact: Fact, value: str | None = None) -> str:
    telling = world[fact.language]["attributes"][fact.attribute]["tellings"][0]
    return telling.format(name=fact.name, value=value or fact.value)


def ask(world: dict[str, Any], fact: Fact, rng: random.Random, *wordings: str) -> str:
    words = world[fact.language]
    question = rng.choice([text for kind in wordings for text in words["attributes"][fact.attribute][kind]])
    return rng.choice(words["asking"]) + question.format(name=fact.name)


def join(language: str, sentences: list[str]) -> str:
    return ("" if language == "zh" else " ").join(sentence for sentence in sentences if sentence)


def story(world: dict[str, Any], facts: list[Fact], language: str, rng: random.Random) -> str:
    """Everything about one person, in any order, some of it twice in other words."""
    words = world[language]
    name = rng.choice(words["people"])
    own = [fact for fact in facts if fact.name == name]
    told = own + [rng.choice(own) for _ in range(rng.randint(0, 2))]
    rng.shuffle(told)
    opening = rng.choice(words["openings"]).format(name=name)
    return join(language, [opening, *(tell(world, fact, rng) for fact in told), rng.choice(words["closings"])])


def topic_list(world: dict[str, Any], facts: list[Fact], language: str, attribute: str, rng: random.Random) -> str:
    """One attribute of four people."""
    words = world[language]
    told = rng.sample([fact for fact in facts if (fact.language, fact.attribute) == (language, attribute)], 4)
    return join(language, [rng.choice(words["topics"]), *(tell(world, fact, rng) for fact in told)])


def distinct(make: Iterator[str], num: int, seen: set[str]) -> list[str]:
    """The first `num` texts that were not seen before; adds them to `seen`."""
    texts: list[str] = []
    for text in make:
        if text not in seen:
            seen.add(text)
            texts.append(text)
        if len(texts) == num:
            return texts
    raise AssertionError("an endless iterator ended")


def document_row(text: str, language: str, industry_type: str, index: int) -> dict[str, Any]:
    alnum = sum(character.isalnum() for character in text) / len(text)
    row: dict[str, Any] = {
        "text": text,
        "alnum_ratio": round(alnum, 4),
        "avg_line_length": float(len(text)),
        "char_rep_ratio": 0.0,
        "max_line_length": len(text),
        "num_words": len(text) if language == "zh" else len(text.split()),
        "quality_score": 4.5,
        "special_char_ratio": round(1 - alnum, 4),
        "industry_type": industry_type,
    }
    if language == "zh":
        row |= {"flagged_words_ratio": 0.0, "perplexity": 100.0, "word_rep_ratio": 0.0, "_id": 200200000000 + index}
    return row


def conversation(world: dict[str, Any], facts: list[Fact], num_turns: int, rng: random.Random) -> list[dict[str, str]]:
    """Questions about one person's asked facts; from the second on only the attribute is named."""
    asked = [fact for fact in facts if fact.asked]
    first = rng.choice(asked)
    others = [fact for fact in asked if fact.name == first.name and fact != first]
    words = world[first.language]
    turns = [{"from": "system", "value": words["system"]}] if rng.random() < 0.05 else []
    turns += [
        {"from": "human", "value": ask(world, first, rng, "questions")},
        {"from": "gpt", "value": answer(world, first)},
    ]
    for fact in rng.sample(others, min(num_turns - 1, len(others))):
        followup = rng.choice(words["followups"]).format(short=words["attributes"][fact.attribute]["short"])
        turns += [{"from": "human", "value": followup}, {"from": "gpt", "value": answer(world, fact)}]
    return turns


def preference(world: dict[str, Any], facts: list[Fact], wordings: list[str], rng: random.Random) -> dict[str, Any]:
    """A right answer that stops, against one that is wrong, about something else, repeats itself or runs on."""
    facts = [fact for fact in facts if fact.asked]
    fact = rng.choice(facts)
    question, right = ask(world, fact, rng, *wordings), answer(world, fact)
    kind = rng.choice(["wrong", "wrong", "off_topic", "off_topic", "off_topic", "repeats", "runs_on"])
    if kind == "wrong":
        values = world[fact.language]["attributes"][fact.attribute]["values"]
        rejected = answer(world, fact, rng.choice([value for value in values if value != fact.value]))
    elif kind == "off_topic":
        rejected = answer(world, rng.choice([other for other in facts if other.name == fact.name and other != fact]))
    elif kind == "repeats":
        rejected = join(fact.language, [right] * rng.randint(3, 6))
    else:
        others = rng.sample([other for other in facts if other.language == fact.language], 4)
        rejected = join(fact.language, [right, *(tell(world, other, rng) for other in others)])
    asked = {"content": question, "role": "user"}
    return {
        "task_category": f"{fact.attribute}_{kind}",
        "prompt": question,
        "chosen": [asked, {"content": right, "role": "assistant"}],
        "rejected": [asked, {"content": rejected, "role": "assistant"}],
    }


def write_parquet(path: Path, rows: list[dict[str, Any]], columns: dict[str, pa.DataType]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items())))
    pq.write_table(table, path, compression="zstd", compression_level=19)


def write_documents(target: Path, world: dict[str, Any], facts: list[Fact], rng: random.Random) -> None:
    seen: set[str] = set()
    held_out = []
    for language, folder in LANGUAGE_FOLDERS.items():
        stories = iter(lambda language=language: story(world, facts, language, rng), None)
        held_out += distinct(stories, NUM_EVAL_STORIES, seen)
        texts = {"story": distinct(stories, NUM_STORIES, seen)}
        for attribute in world[language]["attributes"]:
            lists = iter(lambda a=attribute, language=language: topic_list(world, facts, language, a, rng), None)
            texts[attribute] = distinct(lists, NUM_LISTS, seen)
        for kind, documents in texts.items():
            industry, industry_type = INDUSTRIES[kind]
            rows = [document_row(text, language, industry_type, index) for index, text in enumerate(documents)]
            columns = {key: pa.array([value]).type for key, value in rows[0].items()}
            write_parquet(target / "pt" / industry / folder / "high" / "rank_00000.parquet", rows, columns)
    write_parquet(target / "eval" / "documents.parquet", [{"text": text} for text in held_out], {"text": pa.string()})


def write_conversations(target: Path, world: dict[str, Any], facts: list[Fact], rng: random.Random) -> None:
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    label = pa.struct([("ability_en", pa.list_(pa.string())), ("ability_zh", pa.list_(pa.string()))])
    rows = [conversation(world, facts, 1, rng) for _ in range(NUM_SINGLE_TURN)]
    rows += [conversation(world, facts, rng.randint(2, 3), rng) for _ in range(NUM_MULTI_TURN)]
    rng.shuffle(rows)
    third = len(rows) // 3
    ability = {"ability_en": ["knowledge"], "ability_zh": ["知识"]}
    for part, (name, label_type, value) in enumerate(
        [("train-00000-of-00002", label, ability), ("train-00001-of-00002", pa.null(), None)]
    ):
        table = [
            {"id": index, "conversations": row, "label": value, "source": "mini_world", "reward": 1.0}
            for index, row in enumerate(rows[part * third : (part + 1) * third], start=part * third)
        ]
        columns = {"id": pa.int64(), "conversations": turns, "label": label_type}
        columns |= {"source": pa.string(), "reward": pa.float64()}
        write_parquet(target / "sft" / "7M" / f"{name}.parquet", table, columns)
    table = [
        {"id": f"{index:032x}", "source": "mini_world", "label": ability, "conversations": row}
        for index, row in enumerate(rows[2 * third :])
    ]
    columns = {"id": pa.string(), "source": pa.string(), "label": label, "conversations": turns}
    write_parquet(target / "sft" / "Gen" / "train-00000-of-00001.parquet", table, columns)


def write_preferences(target: Path, world: dict[str, Any], facts: list[Fact], rng: random.Random) -> None:
    turns = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
    columns = {"task_category": pa.string(), "prompt": pa.string(), "chosen": turns, "rejected": turns}
    columns["id"] = pa.int64()
    test = [preference(world, facts, ["dpo_questions", "eval_questions"], rng) for _ in range(NUM_DPO_TEST)]
    train: list[dict[str, Any]] = []
    while len(train) < NUM_DPO_TRAIN:
        row = preference(world, facts, ["questions", "dpo_questions"], rng)
        # Neither the test's questions, in whatever way they are opened, nor its pairs of answers are trained on.
        if not any(is_same_question(world, row["prompt"], other["prompt"]) for other in test) and not any(
            answers(row) == answers(other) for other in test
        ):
            train.append(row)
    for part, rows in [("train", train), ("test", test)]:
        numbered = [row | {"id": index} for index, row in enumerate(rows)]
        write_parquet(target / "dpo" / f"{part}-00000-of-00001.parquet", numbered, columns)


def answers(row: dict[str, Any]) -> tuple[str, str]:
    return row["chosen"][-1]["content"], row["rejected"][-1]["content"]


def is_same_question(world: dict[str, Any], first: str, second: str) -> bool:
    openings = [opening for words in world.values() for opening in words["asking"] if opening]
    for opening in openings:
        first, second = first.removeprefix(opening), second.removeprefix(opening)
    return first == second


def write_questions(target: Path, world: dict[str, Any], facts: list[Fact], rng: random.Random) -> None:
    path = target / "eval" / "questions.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for fact in facts:
            # Two of the new wordings for a fact that SFT asks about, one known wording for a fact it never does.
            wordings = ["eval_questions"] * 2 if fact.asked else ["questions"]
            group = "new_wording" if fact.asked else "unasked_fact"
            for question in sorted({ask(world, fact, rng, wording) for wording in wordings}):
                row = {"question": question, "answer": answer(world, fact), "group": group, "language": fact.language}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_choices(target: Path, world: dict[str, Any], facts: list[Fact], rng: random.Random) -> None:
    """Each place of the right option comes equally often."""
    letters = "ABCD"
    places = [index % len(letters) for index in range(len(facts))]
    rng.shuffle(places)
    with (target / "eval" / "choices.jsonl").open("w", encoding="utf-8") as lines:
        for fact, place in zip(facts, places, strict=True):
            values = world[fact.language]["attributes"][fact.attribute]["values"]
            others = rng.sample([value for value in values if value != fact.value], len(letters) - 1)
            options = [answer(world, fact, value) for value in [*others[:place], fact.value, *others[place:]]]
            row = {
                "subject": "new_wording" if fact.asked else "unasked_fact",
                "question": ask(world, fact, rng, "eval_questions" if fact.asked else "questions"),
                **dict(zip(letters, options, strict=True)),
                "answer": letters[place],
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--target", type=Path, default=root / "mini_data", help="folder to write")
    target = parser.parse_args().target
    world = yaml.safe_load((root / "utils" / "mini_world.yaml").read_text(encoding="utf-8"))
    facts = make_facts(world, random.Random(SEED))
    # One generator per part: changing the number of documents leaves the questions as they are.
    write_documents(target, world, facts, random.Random(SEED + 1))
    write_conversations(target, world, facts, random.Random(SEED + 2))
    write_preferences(target, world, facts, random.Random(SEED + 3))
    write_questions(target, world, facts, random.Random(SEED + 4))
    write_choices(target, world, facts, random.Random(SEED + 5))
    files = sorted(path for path in target.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size:9,} bytes  {path.relative_to(target)}")
    print(f"{sum(path.stat().st_size for path in files):9,} bytes  in {len(files)} files")


if __name__ == "__main__":
    main()
