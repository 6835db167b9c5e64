"""What a rationale may say: the checker and the title index, without a service."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semantic_ids.catalog import Catalog
from semantic_ids.catalog_changes import CatalogItem, ItemChanges
from semantic_ids.codes import SidSpace
from semantic_ids.columns import StringColumn
from service.catalog_titles import CatalogTitles, TitleIndex, folded, words_of
from service.rationale_check import NamedItems, RationaleCheck

SPACE = SidSpace(3, 16)
TITLES = [
    "Breville Electric Kettle",  # 0 to 2: the history
    "The Dr. Strange Story",
    'A 12" Skillet "Pro"',
    "Toaster Deluxe",  # 3, 4: the answer
    "七人の侍",
    "Alien",  # from here on: what may not be named
    "It",
    "Dove",
    "Green Tea",
    "hair brush",
    "Breville Electric Kettle And Toaster Set",
    "Electric Kettle",
    "Éclair Máchine 3000",
    "the long way to nowhere at all",
    "羅生門と蜘蛛",
    "",
]
CATALOG = Catalog.build(
    SPACE,
    [f"item-{number}" for number in range(len(TITLES))],
    np.array([(number, 1, 2) for number in range(len(TITLES))]),
    np.zeros(len(TITLES), np.int64),
    TITLES,
    [["Kitchen > Small Appliances"]] * len(TITLES),
)
INDEX = CatalogTitles(CATALOG)
HISTORY = NamedItems.of(CATALOG, np.arange(3))
ANSWER = NamedItems.of(CATALOG, np.arange(3, 5))


def sid(*codes: int) -> str:
    return SPACE.format(codes)


def check(text: str) -> RationaleCheck:
    one = RationaleCheck(SPACE, INDEX, HISTORY)
    one.finish(text, ANSWER)
    return one


def assert_passes(text: str, shown: str | None = None) -> None:
    one = check(text)
    assert (one.text, one.cuts) == (text if shown is None else shown, {})


def assert_cut(text: str, kind: str) -> None:
    """Alone, and between two sentences that stay."""
    assert (check(text).text, check(text).cuts) == ("", {kind: 1})
    between = check(f"It boils. {text}\nIt is red.")
    assert (between.text, between.cuts) == ("It boils.\nIt is red.", {kind: 1})


class TestSids:
    """Codes are for the model."""

    def test_one_that_may_be_named_is_shown_by_its_title(self):
        assert_passes(f"You like {sid(0, 1, 2)}.", "You like Breville Electric Kettle.")
        assert_passes(f"Then {sid(3, 1, 2)} and {sid(4, 1, 2)}.", "Then Toaster Deluxe and 七人の侍.")

    def test_its_title_behind_it_is_not_said_twice(self):
        assert_passes(f"{sid(3, 1, 2)} toaster deluxe fits.", "Toaster Deluxe fits.")

    def test_an_item_without_a_title_is_shown_by_its_id(self):
        one = RationaleCheck(SPACE, INDEX, NamedItems.of(CATALOG, np.array([15])))
        one.finish(f"See {sid(15, 1, 2)}.", ANSWER)
        assert one.text == "See item-15."

    @pytest.mark.parametrize(
        "text",
        [
            f"Take {sid(5, 1, 2)}.",
            f"Take {sid(9, 9, 9)}.",
            "Take <a_0>.",
            "Take <a_0><b_1>.",
            "Take <b_1><c_2>.",
            "Take <a_0><b_1><c_2><c_3>.",
            "Take <a_0><c_2><b_1>.",
            "Take <a_0> and <b_1><c_2>.",
            "Take <a_16><b_1><c_2>.",
            "Take <a_00><b_1><c_2>.",
            "Take <A_0><B_1><C_2>.",
            "Take < a_0 >< b_1 >< c_2 >.",
            "Take <z_7>.",
            "Take <a_0><b_1><c_",
            "Take <a_0><b_1><c_2",
        ],
    )
    def test_any_other_and_any_part_of_one_is_an_invention(self, text: str):
        assert check(text).cuts == {"sid": 1}
        assert check(text).text == ""

    def test_white_space_between_its_tokens_is_none(self):
        assert_passes("You like <a_0> <b_1>  <c_2>.", "You like Breville Electric Kettle.")

    def test_less_than_signs_are_no_sids(self):
        assert_passes("1 < a and a > b, <b>bold</b>.")


class TestTitles:
    """Items of the catalogue that are not shown."""

    @pytest.mark.parametrize(
        "text",
        [
            "You also want Green Tea.",
            "You also want GREEN  TEA.",
            "You want a Green-Tea pot.",
            "Watch Alien tonight.",
            "It is a Dove soap.",
            'Read "it" again.',
            "Buy a “hair brush” too.",
            "the LONG way, to nowhere at all.",
            "Try the Eclair Machine 3000.",
            "Try the E\u0301clair Ma\u0301chine ３０００.",
            "Watch 羅生門と蜘蛛 next.",
            "The Breville electric kettle and toaster set is new.",
            "Any Electric Kettle will do.",
        ],
    )
    def test_are_inventions(self, text: str):
        assert_cut(text, "title")

    @pytest.mark.parametrize(
        "text",
        [
            "You bought the Breville Electric Kettle.",
            "the breville ELECTRIC kettle, again.",
            "A Toaster Deluxe follows.",
            "次は七人の侍です。",
            "It is it, and it is alien to me.",
            "Alien tastes.",
            "Peace, said the dove, with green tea and a hair brush.",
            "Green teapots, Green-eyed Teams.",
            "A kettle that is Electric.",
            "The Breville Electric Kettle and a Toaster.",
            "",
        ],
    )
    def test_titles_that_may_be_named_and_ordinary_words_pass(self, text: str):
        assert_passes(text)

    def test_one_within_the_beginning_of_a_long_title_that_may_be_named_passes(self):
        """A prompt shows the beginning of a long title only, so that is what a model writes."""
        titles = ["Acme Dry Hair Shampoo For Every Day And Every Kind Of Water Three Bottles", "Dry Hair", "Acme Dry"]
        catalog = catalog_of(titles)
        one = RationaleCheck(SPACE, CatalogTitles(catalog), NamedItems.of(catalog, np.array([0])))
        one.finish(
            "Acme Dry Hair Shampoo For Every Day And is good. Any Dry Hair is not.",
            NamedItems.of(catalog, np.array([0])),
        )
        assert one.text == "Acme Dry Hair Shampoo For Every Day And is good."

    def test_one_over_two_sentences_is_completed_by_neither(self):
        catalog = catalog_of(["Kettle", "Hello Mr. Bean Story"])
        one = RationaleCheck(SPACE, CatalogTitles(catalog), NamedItems.of(catalog, np.array([0])))
        one.finish("You liked hello Mr. Bean story. It boils.", NamedItems.of(catalog, np.array([0])))
        assert one.text == "You liked hello Mr. It boils."

    def test_none_comes_together_over_a_cut(self):
        catalog = catalog_of(["Kettle", "one two three four"])
        one = RationaleCheck(SPACE, CatalogTitles(catalog), NamedItems.of(catalog, np.array([0])))
        one.finish("It is one two. <a_9>! Three four of them.", NamedItems.of(catalog, np.array([0])))
        assert one.text == "It is one two."
        assert one.cuts == {"sid": 1, "title": 1}


def catalog_of(titles: Sequence[str]) -> Catalog:
    codes = np.array([(number // 16, number % 16, 0) for number in range(len(titles))])
    ids = [str(number) for number in range(len(titles))]
    return Catalog.build(SPACE, ids, codes, np.zeros(len(titles), np.int64), titles, [[]] * len(titles))


class TestQuotes:
    """A name in quotes is a claim."""

    @pytest.mark.parametrize(
        "text",
        [
            "Buy the “Wonder Mixer”.",
            'Buy the "Wonder Mixer".',
            "Buy the «Wonder Mixer».",
            "Buy the *Wonder Mixer*.",
            "Buy the **Wonder Mixer**.",
            "次は「黒い雨」です。",
            'Buy the "Wonder of the Sea" now.',
            'Buy "Gizmo".',
            'Buy the "Wonder Mixer',
            'Buy the "Kettle Deluxe".',
        ],
    )
    def test_that_is_no_title_is_an_invention(self, text: str):
        assert_cut(text, "quote")

    @pytest.mark.parametrize(
        "text",
        [
            "Buy the “Toaster Deluxe”.",
            'Your "Breville Kettle" is old.',
            "A *very* good one, “cosy” and 'Fine'.",
            'You said: "I want something that boils".',
            'From "Small Appliances" in "Kitchen".',
            'A 12" pan and a 14" pan.',
            f"The “{sid(2, 1, 2)}” it is.".replace(sid(2, 1, 2), 'A 12" Skillet "Pro"'),
            "2 * 3 * Four is no emphasis, nor is\n* A list\n* Of things",
            "It’s the users’ Own.",
        ],
    )
    def test_that_is_one_or_no_name_passes(self, text: str):
        assert_passes(text)

    def test_a_quote_of_several_sentences_is_one(self):
        assert check('Say "Who? Which Mixer next" aloud. It boils.').text == "It boils."


class TestPieces:
    """What is told early is never taken back."""

    def test_a_sentence_waits_for_the_answer_with_all_that_follow(self):
        thought = "You like tea. So buy the Toaster Deluxe. It is red. Green Tea is not.  It ends"
        one = RationaleCheck(SPACE, INDEX, HISTORY)
        assert one.grow(thought) == "You like tea."
        assert one.grow(thought) == ""
        assert one.finish(thought, ANSWER) == " So buy the Toaster Deluxe. It is red.  It ends"
        assert one.cuts == {"title": 1}

    def test_a_sentence_is_told_when_it_is_over(self):
        one = RationaleCheck(SPACE, INDEX, HISTORY)
        assert [one.grow(text) for text in ("It", "It boils", "It boils.", "It boils. ", "It boils. W")] == [
            "", "", "", "It boils.", "",
        ]  # fmt: skip

    def test_white_space_at_the_end_of_a_line_is_not_told_before_more_follows(self):
        one = RationaleCheck(SPACE, INDEX, HISTORY)
        assert one.grow("It boils \nW") == "It boils"
        assert one.finish("It boils \nWell", ANSWER) == " \nWell"

    def test_nothing_is_left_of_white_space(self):
        for thought in ("", " \n ", f"\n{sid(9, 9, 9)}. \n", "\n\n"):
            one = RationaleCheck(SPACE, INDEX, HISTORY)
            assert one.grow(thought) + one.finish(thought, ANSWER) == one.text == ""

    @given(st.data())
    def test_however_it_comes_it_is_the_same_and_sound(self, data: st.DataObject):
        words = [*TITLES[:14], *TITLES[:5], sid(0, 1, 2), sid(3, 1, 2), sid(9, 9, 9), "<a_0>", "it", "tea.", "Wow!",
                 "“", "”", '"', "*", "\n", ".", "?", "Mixer", "七", "。", "e\u0301", "ß", "ﬁne", "\u200b"]  # fmt: skip
        parts = data.draw(st.lists(st.sampled_from(words), max_size=14))
        thought = data.draw(st.sampled_from([" ", ""])).join(parts)
        whole = check(thought)
        grown = RationaleCheck(SPACE, INDEX, HISTORY)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(thought)), max_size=6)))
        told = "".join(grown.grow(thought[:cut]) for cut in cuts) + grown.finish(thought, ANSWER)
        assert told == grown.text == whole.text
        assert grown.cuts == whole.cuts
        assert whole.text == whole.text.strip()
        assert not SPACE.mentions(whole.text)
        shown = words_of(whole.text)
        runs = {tuple(word.folded for word in shown[one.first : one.end]) for one in INDEX.matches(shown)}
        assert not runs & {folded(TITLES[10]), folded(TITLES[13])}, "titles that no other one hides"


def test_the_index_finds_what_a_plain_search_finds():
    rng = random.Random(3)
    vocabulary = [
        "a",
        "Ab",
        "ß",
        "é",
        "e\u0301",
        "Ünder",
        "½",
        "x-y",
        "日",
        "本",
        "日本",
        "ﬁ",
        "™",
        "İ",
        "12",
        "…",
        "ö",
    ]
    titles = [" ".join(rng.choices(vocabulary, k=rng.randint(0, 4))) for _ in range(3_000)]
    index = TitleIndex(StringColumn.of(titles))
    known = {folded(title) for title in titles}
    for _ in range(200):
        words = words_of(" ".join(rng.choices(vocabulary, k=rng.randint(0, 9))))
        from_word = rng.randint(0, 3)
        found = {(match.first, match.end) for match in index.matches(words, from_word)}
        runs = [(first, end) for first in range(len(words)) for end in range(first + 1, len(words) + 1)]
        assert found == {
            (first, end)
            for first, end in runs
            if end > from_word and tuple(word.folded for word in words[first:end]) in known
        }


@pytest.mark.parametrize(("titles", "num_indexed"), [([""], 0), (["", "…"], 0), (["x"], 1), (["a " * 60, "b"], 1)])
def test_an_index_of_almost_nothing(titles: list[str], num_indexed: int):
    index = TitleIndex(StringColumn.of(titles))
    assert len(index) == num_indexed
    assert index.matches(words_of("")) == []


def test_an_epoch_keeps_the_index_of_its_base_and_knows_what_was_put():
    put = CatalogItem("new", "Wonder Mixer", (), (8, 8, 8))
    epoch = CATALOG.with_changes(ItemChanges((put,), frozenset({"item-8"}), 2))
    titles = INDEX.at(epoch)
    INDEX.matches(words_of("x"))
    base: Any = INDEX._base._index
    found = titles.matches(words_of("Wonder Mixer with Green Tea"))
    assert titles._base._index is base
    assert [match.title for match in found] == ["Green Tea", "Wonder Mixer"], "what is deleted may not be named either"
    merged = catalog_of(["Wonder Mixer", "Other Thing"])
    assert [match.title for match in titles.at(merged).matches(words_of("Other Thing"))] == ["Other Thing"]
