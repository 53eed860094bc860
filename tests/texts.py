"""Sixteen real texts of many kinds: what a tokenizer and a model meet."""

TEXTS = [
    "What is 17 + 25? The answer is 42.",
    "The quick brown fox jumps over the lazy dog, and then it rests under a tree.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "print(fibonacci(10))",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller "
    "staatlichen Gewalt.",
    "人皆生而自由；在尊严及权利上均各平等。人各赋有理性良知，诚应和睦相处，情同手足。",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife. However little known the feelings or views of such a man may be on his first entering "
    "a neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is "
    "considered as the rightful property of some one or other of their daughters.",
    "When in the Course of human events, it becomes necessary for one people to dissolve the political bands "
    "which have connected them with another, and to assume among the powers of the earth, the separate and "
    "equal station to which the Laws of Nature and of Nature's God entitle them, a decent respect to the "
    "opinions of mankind requires that they should declare the causes which impel them to the separation.",
    "Let $f(x) = x^3 - 3x + 1$. Then $f'(x) = 3x^2 - 3$, so the critical points are $x = \\pm 1$, and "
    "$\\boxed{f(-1) = 3}$ is the local maximum.",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many "
    "clips did Natalia sell altogether in April and May?\nIn May she sold 48/2 = 24 clips. Altogether she "
    "sold 48+24 = 72 clips.",
    '{"name": "widget", "price": 9.99, "tags": ["a", "b"], "stock": {"shelf": 12, "back": 0}}',
    "SELECT city, COUNT(*) AS n FROM users WHERE age >= 21 GROUP BY city ORDER BY n DESC LIMIT 10;",
    "Всё счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.",
    "  two leading spaces,\ttabs\t\tand   runs of   blanks\n\n\nand empty lines\r\nof both kinds ",
    "I 🙂 emoji 👩‍👩‍👧‍👦 and naïve café résumé, œuvre, ﬁ, ½, ², ∑, ∞, ≠ and z̴a̴l̴g̴o̴.",
    "1234567890 3.14159 -273.15 6.022e23 0x1F 1,000,000 12:30 2026-01-31 192.168.0.1 +49 30 901820",
    "<b>bold</b> &amp; <!-- comment --> http://example.com/a?b=c&d=%20#e user@example.org",
]
