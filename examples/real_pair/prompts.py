"""Questions for a small chat model, made by filling sentences with words: as many as are needed, all different."""

import random

TOPICS = (
    "rain", "the moon", "bread", "a compass", "sleep", "the number zero", "a bicycle", "salt", "magnets", "the heart", "a library",
    "glass", "volcanoes", "bees", "the stock market", "a lighthouse", "gravity", "chess", "soap", "the Roman Empire", "tea",
    "photosynthesis", "a good friend", "the alphabet", "rust", "dreams", "a black hole", "cheese", "the ocean tides", "paper",
)  # fmt: skip
SENTENCES = (
    "Explain {} to a child in two sentences.",
    "What is {} good for?",
    "Write a short poem about {}.",
    "Give me three facts about {}.",
    "Tell a story of four sentences in which {} matters.",
    "Why do people care about {}?",
    "Describe {} without naming it.",
    "What would the world be like without {}?",
    "Write one question about {} for a quiz, and its answer.",
    "How would you introduce {} in a talk?",
)


def questions(count: int, held_out: bool) -> list[str]:
    """Different questions in a fixed random order; the held-out ones are about topics that the others never name.

    Raises:
        ValueError: fewer are to be had.
    """
    topics = TOPICS[::5] if held_out else [topic for place, topic in enumerate(TOPICS) if place % 5]
    every = [sentence.format(topic) for topic in topics for sentence in SENTENCES]
    if count > len(every):
        raise ValueError(f"{count} questions were asked for, and {len(every)} can be made: add topics or sentences")
    random.Random(0).shuffle(every)
    return every[:count]
