"""Chains: problems that can be solved by hand, a vocabulary of 31 words, and a checker that names each kind of error."""

from __future__ import annotations

import random

import pytest

from telltale.errors import ConfigError, DataError
from telltale.tasks.chain_checker import ERRORS, accept, check_solution, check_step, corrupted
from telltale.tasks.chains import (
    MODULUS,
    OPERATIONS,
    VARIANTS,
    VOCABULARY,
    Problem,
    Statement,
    generate,
    segment,
    tokenizer,
    triples,
    withheld,
)

SMALL = Problem(
    (Statement("Fay", 3), Statement("Hal", "Fay", "minus", 5), Statement("Bob", "Hal", "times", "Fay")), question="Bob"
)


def test_a_problem_by_hand() -> None:
    assert SMALL.prompt == "Fay has 3 . Hal has Fay minus 5 . Bob has Hal times Fay . how many has Bob ? \n\n"
    assert SMALL.steps == ["Hal has Fay minus 5 = 3 minus 5 = 5", "Bob has Hal times Fay = 5 times 3 = 1", "answer 1"]
    assert (SMALL.answer, SMALL.values) == (1, {"Fay": 3, "Hal": 5, "Bob": 1})
    assert triples(SMALL) == [("minus", 3, 5), ("times", 5, 3)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_true_solutions_are_right_in_every_step(variant: str) -> None:
    problems = generate(200, seed=0, variant=variant)
    for problem in problems:
        verdict = check_solution(problem, problem.solution + " <eos>")
        assert verdict.valid
        assert verdict.correct
        assert verdict.complete == 1.0
        assert len(verdict.steps) == len(problem.needed) + 1
        computed = len(problem.statements) - 1
        assert len(problem.needed) == (computed if variant == "ordered" else computed - 1)
    lengths = {len(problem.needed) for problem in problems}
    assert lengths == ({4, 5, 6} if variant == "ordered" else {3, 4, 5})
    assert {problem.answer for problem in problems} == set(range(MODULUS))


def test_ordered_steps_have_twelve_tokens_and_shuffled_statements_need_planning() -> None:
    words = tokenizer()
    for problem in generate(50, seed=1):
        assert {len(words(f"{step} \n\n")["input_ids"]) for step in problem.steps[:-1]} == {12}
        told = [statement.name for statement in problem.statements if statement.operation]
        assert told == [statement.name for statement in problem.needed]
    shuffled = generate(50, seed=1, variant="shuffled")
    assert sum([s.name for s in p.statements if s in p.needed] != [s.name for s in p.needed] for p in shuffled) > 30


def test_the_seed_decides_and_variants_differ() -> None:
    assert generate(20, seed=3) == generate(20, seed=3)
    assert generate(20, seed=3) != generate(20, seed=4)
    assert generate(5, seed=3) == generate(20, seed=3)[:5]


def test_the_vocabulary_is_31_words_and_text_comes_back() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 31
    words = tokenizer()
    for problem in generate(30, seed=2, variant="shuffled"):
        text = f"{problem.prompt} {problem.solution}"
        ids = words(text)["input_ids"]
        assert max(ids) < 31
        assert words.decode(ids) == text
    assert words.convert_ids_to_tokens(words("a")["input_ids"]) == ["<unk>"]
    assert tokenizer(["surely"]).convert_tokens_to_ids("surely") == 31


def test_the_chat_template_is_prompt_and_solution() -> None:
    words = tokenizer()
    messages = [{"role": "user", "content": SMALL.prompt}, {"role": "assistant", "content": SMALL.solution}]
    ids = words.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert words.decode(ids) == f"<bos> {SMALL.prompt} {SMALL.solution} <eos>"


def test_segments_are_what_stands_between_blank_lines() -> None:
    assert segment(SMALL.solution) == SMALL.steps
    assert segment("a \n\n \n\n b") == ["a", "", "b"]


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("Hal has Fay minus 5 = 3 minus 5 = 5", None),
        ("Hal has Fay minus 5 = 3 minus 5 = 4", "arithmetic"),
        ("Hal has Fay minus 5 = 2 minus 5 = 4", "grounding"),
        ("Hal has Fay minus 4 = 3 minus 4 = 6", "grounding"),
        ("Hal has Fay plus 5 = 3 plus 5 = 1", "grounding"),
        ("Bob has Hal times Fay = 5 times 3 = 1", "order"),
        ("Fay has Fay minus 5 = 3 minus 5 = 5", "form"),
        ("Ned has Fay minus 5 = 3 minus 5 = 5", "form"),
        ("Hal has Fay minus 5 = 3 minus 5 = 9", "form"),
        ("Hal has Fay minus 5 = 3 minus 5", "form"),
        ("", "form"),
        ("answer 1", "order"),
        ("answer x", "form"),
    ],
)
def test_each_error_has_its_name(step: str, error: str | None) -> None:
    verdict = check_step(SMALL, SMALL.given, step)
    assert (verdict.right, verdict.error) == (error is None, error)


def test_a_right_step_on_a_wrong_value_is_right_and_a_repeated_one_is_not() -> None:
    wrong = check_step(SMALL, SMALL.given, "Hal has Fay minus 5 = 3 minus 5 = 2")
    accepted = accept(SMALL.given, wrong)
    assert accepted["Hal"] == 2
    assert check_step(SMALL, accepted, "Bob has Hal times Fay = 2 times 3 = 6").right
    assert check_step(SMALL, accepted, "Bob has Hal times Fay = 5 times 3 = 1").error == "grounding"
    assert check_step(SMALL, accepted, "Hal has Fay minus 5 = 3 minus 5 = 5").error == "order"
    done = accepted | {"Bob": 6}
    assert check_step(SMALL, done, "answer 6").right
    assert check_step(SMALL, done, "answer 1").error == "grounding"
    verdict = check_solution(
        SMALL, "Hal has Fay minus 5 = 3 minus 5 = 2 \n\n Bob has Hal times Fay = 2 times 3 = 6 \n\n answer 6"
    )
    assert ([v.right for v in verdict.steps], verdict.correct, verdict.valid) == ([False, True, True], False, False)


@pytest.mark.parametrize("error", ERRORS)
def test_planted_errors_are_found_as_what_they_are(error: str) -> None:
    chance = random.Random(0)
    for problem in generate(100, seed=5):
        solution = corrupted(problem, error, chance)
        kinds = [verdict.error for verdict in check_solution(problem, solution).steps if not verdict.right]
        assert kinds[0] == error
        if error in ("arithmetic", "grounding"):
            assert kinds == [error]


def test_incomplete_solutions_say_how_far_they_got() -> None:
    verdict = check_solution(SMALL, SMALL.steps[0])
    assert (verdict.answer, verdict.correct, verdict.complete) == (None, False, 0.5)
    assert not check_solution(SMALL, "").valid


def test_withheld_triples_do_not_occur() -> None:
    rule = withheld(0.3, seed=1)
    everything = [(name, a, b) for name in OPERATIONS for a in range(MODULUS) for b in range(MODULUS)]
    assert 0.2 < sum(map(rule, everything)) / len(everything) < 0.4
    assert not any(rule(triple) for problem in generate(100, seed=6, without=rule) for triple in triples(problem))
    assert any(rule(triple) for problem in generate(100, seed=6) for triple in triples(problem))


def test_the_share_of_second_operands_to_look_up_can_be_set() -> None:
    def share(**options: float) -> float:
        computed = [s for problem in generate(300, seed=7, **options) for s in problem.needed]
        return sum(all(isinstance(operand, str) for operand in s.operands) for s in computed) / len(computed)

    assert share(variables=0.0) == 0.0
    assert share(variables=1.0) == 1.0
    assert 0.45 < share() < 0.55
    assert generate(50, seed=7, variables=0.5) == generate(50, seed=7)
    with pytest.raises(ConfigError, match=r"variables=1\.5"):
        generate(1, seed=0, variables=1.5)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="count=0"):
        generate(0, seed=0)
    with pytest.raises(ConfigError, match="variant='reversed'"):
        generate(1, seed=0, variant="reversed")
    with pytest.raises(ConfigError, match="out of range"):
        generate(1, seed=0, steps=(5, 4))
    with pytest.raises(ConfigError, match="expected it to leave more"):
        generate(3, seed=0, without=lambda triple: True)
    with pytest.raises(ConfigError, match="share=1"):
        withheld(1.0)
    single = Problem((Statement("Fay", 1), Statement("Hal", "Fay", "plus", 1)), "Hal")
    with pytest.raises(DataError, match="needs a step that depends"):
        corrupted(single, "order", random.Random(0))
