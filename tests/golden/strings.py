"""The 200 strings of the tokenizer's golden file: what conversations hold, and what breaks tokenizers."""

CONTROL = "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <jupyter_start>"

SENTENCES = [  # 40: scripts
    "The quick brown fox jumps over the lazy dog.",
    "It's what I've said: they'll go, you're in, she'd know, I'm not, he's off, we don't.",
    "IT'S WHAT I'VE SAID: THEY'LL GO, YOU'RE IN, SHE'D KNOW, I'M NOT.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Voix ambiguë d'un cœur qui au zéphyr préfère les jattes de kiwis.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío.",
    "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim queixoso.",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İSTANBUL ılık",
    "Árvíztűrő tükörfúrógép",
    "Flygande bäckasiner søka hwila på mjuka tuvor. Þórður",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Чуєш їх, доцю, га? Кумедна ж ти, прощайся без ґольфів!",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "ძველი ქართული ანბანი",
    "Բարեւ ձեզ, ինչպե՞ս եք",
    "נוף יפה מאוד, שלום עולם",
    "صِف خَلقَ خَودٍ كَمِثلِ الشَمسِ إِذ بَزَغَت",
    "السلام عليكم ۱۲۳ ٤٥٦",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा १२३",
    "আমার সোনার বাংলা, আমি তোমায় ভালোবাসি",
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல்",
    "ఏ దేశమేగినా ఎందుకాలిడినా",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "ສະບາຍດີ ຊາວໂລກ",
    "ဟယ်လို ကမ္ဘာ",
    "សួស្តី ពិភពលោក",
    "བཀྲ་ཤིས་བདེ་ལེགས།",
    "いろはにほへと ちりぬるを 色は匂へど",
    "カタカナとｶﾀｶﾅ、全角ＡＢＣ１２３",
    "我能吞下玻璃而不伤身体。第一百二十三条",
    "我能吞下玻璃而不傷身體。",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요",
    "각 (decomposed hangul)",
    "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ",
    "ሰላም ለዓለም ፩፪፫",
    "ᐊᐃᓐᓇᐃ ᓄᓇᕐᔪᐊᖅ",
    "Ⅳ ⅷ ½ ¾ ² ³ ₁₂ ① ㊿ 〇 零 Ⅻ",
    "Tiếng Việt: Chào thế giới, đặng, nghiễm",
]

DIGITS = [  # 20
    "0", "12", "123", "1234567890", "3.14159", "1,000,000", "2026-11-23T18:20:00Z", "0x1F4A9", "1e-5",
    "v1.2.3-rc4", "007", " 42", "42 ", " 4 2 ", "١٢٣٤٥", "１２３", "IPv4 192.168.0.1:8080", "50%off", "a1b2c3",
    "$1,234.56 or €99,90",
]

SPACES = [  # 30
    " ", "  ", "   ", "    ", "\t", "\n", "\n\n", "\n\n\n", "\r\n", "\r", " \n", "\n ", " \n \n ", "\t\t\tx",
    "a b", "a  b", "a   b", "a\tb", "a \tb", " a", "  a", "a ", "a  ", "x\n  y\n    z",
    "non\u00a0breaking", "thin\u2009space\u200ahair", "ideographic\u3000space", "line\u2028sep\u2029para",
    "zero\u200bwidth\ufeffbom", "vertical\x0btab\x0cfeed\x85nel",
]

SPECIAL = [  # 25: as control tokens where parsed, as text where not
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_end|><|im_end|>", "a<|im_end|>b", " <|im_end|> ",
    "<|im_end", "<|im_end|", "|im_end|>", "<| im_end |>", "<|IM_END|>", "<<|im_end|>>", "<|im_<|im_end|>end|>",
    "<repo_name>x<file_sep>y", "<jupyter_start><jupyter_text>", "<reponame>", "<filename>a.py<gh_stars>100-1000",
    "<issue_start><issue_comment><issue_closed>", "<empty_output>", "<unk>", "<s></s>", "[INST] hi [/INST]",
    "Ġ Ċ ĉ Ā (the byte alphabet itself)", CONTROL,
]

EMOJI = [  # 20
    "😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "☃", "5️⃣", "🤷🏻‍♀️", "text😀text", "😀 😀", "😀😀😀😀😀😀😀😀", "✨ok✨",
    "🧑‍🚀 to the 🌕!", "©®™", "→ ⇒ ∀x∈ℝ: x²≥0", "♠♥♦♣", "█▓▒░", "𝕳𝖊𝖑𝖑𝖔 𝟙𝟚𝟛", "𠜎𠜱𠝹 (plane 2)",
]

CODE = [  # 25
    "def f(x):\n    return x + 1\n", "fn main() {\n    println!(\"{}\", 1 << 20);\n}\n",
    "for (int i = 0; i < n; ++i) { a[i] *= 2; }", "SELECT * FROM t WHERE a='b' AND c<>3;",
    "<div class=\"x\">&nbsp;</div>", "{\"a\": [1, 2.5, null, true], \"b\": {\"c\": \"\\u00e9\"}}",
    "if x == 1 and y != 2 or not z:\n\tpass", "git commit -m 'fix: a bug' && git push", "#!/bin/sh\nset -eu\n",
    "// TODO: x\n/* y */", "a->b::c<d>&&e", "$HOME/.cache/*.gguf", "C:\\Users\\x\\file.txt", "http://a.b/c?d=e&f=g#h",
    "user@example.com", "__init__.py", "snake_case camelCase PascalCase SCREAMING_CASE kebab-case", "x=y==z===w",
    "\"\"\"doc\"\"\"", "'''", "``` rust\nlet x = 1;\n```", "\\alpha^{2}_{i} \\frac{1}{2}", "| a | b |\n|---|---|\n| 1 | 2 |",
    "- [x] done\n- [ ] todo\n", "0b1010 0o17 0xFFu8 1_000",
]

MARKS = [  # 15
    "e\u0301", "\u00e9", "n\u0303o", "\u0301", "a\u0300\u0301\u0302\u0303", "Z\u0351\u036b\u0343a\u0328l\u0321g\u0322o",
    "fi\ufb01 \ufb03", "\u01c6 \u01c5", "\u1e9e \u00df ss", "\u212b \u00c5 A\u030a", "\u202ertl\u202c", "soft\u00adhyphen",
    "a\u034fb\u2060c", "\u0915\u094d\u0937", "quo\u2018te\u2019s \u201cx\u201d \u2026 \u2014 \u2013",
]

RUNS = [  # 25
    "a" * 100, "ab" * 60, " " * 70, "\n" * 40, "=" * 80, "-" * 33, "." * 50, "!?" * 20, "ha" * 30, "1" * 40,
    "é" * 30, "日" * 40, "😀" * 12, "_" * 64, "#" * 7, "\t" * 17, " \t" * 9, "(((((((((())))))))))", "'" * 9, "''s 'S 'll",
    "supercalifragilisticexpialidocious" * 2, "Donaudampfschifffahrtsgesellschaftskapitän",
    "Lopadotemachoselachogaleokranioleipsanodrimhypotrimmatosilphiokarabomelitokatakechymenokichlepikossyphophatto",
    "the " * 30, "\u0001\u0002\u0003 \u0007 \u001b[31mred\u001b[0m \u007f",
]

STRINGS = SENTENCES + DIGITS + SPACES + SPECIAL + EMOJI + CODE + MARKS + RUNS
assert len(STRINGS) == 200, len(STRINGS)
assert len(set(STRINGS)) == 200, "each string once"
