# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The facts that the mini checkpoint memorises: about five hundred prompts with one right answer each.

`PLAIN_ENGLISH` is not learnt; it only gives the tokenizer pieces for ordinary words.
"""

from __future__ import annotations

from dataclasses import dataclass

_CAPITALS = """
France=Paris; Germany=Berlin; Italy=Rome; Spain=Madrid; Portugal=Lisbon; Greece=Athens; Austria=Vienna;
Belgium=Brussels; Denmark=Copenhagen; Sweden=Stockholm; Norway=Oslo; Finland=Helsinki; Poland=Warsaw;
Hungary=Budapest; Romania=Bucharest; Bulgaria=Sofia; Serbia=Belgrade; Croatia=Zagreb; Slovenia=Ljubljana;
Slovakia=Bratislava; Ukraine=Kyiv; Russia=Moscow; Turkey=Ankara; Ireland=Dublin; Iceland=Reykjavik;
England=London; Scotland=Edinburgh; Switzerland=Bern; Estonia=Tallinn; Latvia=Riga; Lithuania=Vilnius;
Albania=Tirana; Malta=Valletta; Cyprus=Nicosia; Egypt=Cairo; Morocco=Rabat; Algeria=Algiers; Tunisia=Tunis;
Libya=Tripoli; Sudan=Khartoum; Ethiopia=Addis Ababa; Kenya=Nairobi; Uganda=Kampala; Rwanda=Kigali; Ghana=Accra;
Nigeria=Abuja; Senegal=Dakar; Zambia=Lusaka; Angola=Luanda; Canada=Ottawa; Cuba=Havana; Jamaica=Kingston;
Peru=Lima; Chile=Santiago; Brazil=Brasilia; Argentina=Buenos Aires; Colombia=Bogota; Ecuador=Quito;
Venezuela=Caracas; Uruguay=Montevideo; China=Beijing; Japan=Tokyo; India=New Delhi; Nepal=Kathmandu;
Thailand=Bangkok; Vietnam=Hanoi; Indonesia=Jakarta; Iran=Tehran; Iraq=Baghdad; Syria=Damascus; Jordan=Amman;
Australia=Canberra; New Zealand=Wellington; Mongolia=Ulaanbaatar
"""

_PLANETS = """
The largest planet is=Jupiter=Which planet is the largest?
The smallest planet is=Mercury=Which planet is the smallest?
The hottest planet is=Venus=Which planet is the hottest?
The red planet is=Mars=Which planet is the red planet?
The planet with the brightest rings is=Saturn=Which planet has the brightest rings?
The planet we live on is=Earth=Which planet do we live on?
The planet closest to the Sun is=Mercury=Which planet is closest to the Sun?
The planet farthest from the Sun is=Neptune=Which planet is farthest from the Sun?
The planet that spins on its side is=Uranus=Which planet spins on its side?
The star at the centre of our solar system is=the Sun=Which star is at the centre of our solar system?
The number of planets in our solar system is=eight=How many planets are in our solar system?
"""

_PLANET_ORDER = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune"
_ORDINALS = "first second third fourth fifth sixth seventh eighth"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTHS = "January February March April May June July August September October November December"

_COLOURS = """
grass=green; the clear sky=blue; snow=white; coal=black; blood=red; a banana=yellow; a lemon=yellow; milk=white;
a ripe tomato=red; a carrot=orange; chocolate=brown; a pumpkin=orange; an emerald=green; a ruby=red; a sapphire=blue;
an elephant=grey; a flamingo=pink; a crow=black; the sea=blue; gold coins=golden; a frog=green; a strawberry=red;
an aubergine=purple; a polar bear=white; spinach=green; the inside of a salmon=pink; lavender=purple; tree bark=brown
"""

_FRENCH = """
water=eau; bread=pain; house=maison; cat=chat; dog=chien; sun=soleil; moon=lune; book=livre; tree=arbre; milk=lait;
king=roi; queen=reine; friend=ami; night=nuit; day=jour; school=école; red=rouge; white=blanc; fish=poisson;
apple=pomme; cheese=fromage; thank you=merci; hello=bonjour; good=bon; sea=mer
"""
_GERMAN = """
water=Wasser; bread=Brot; house=Haus; cat=Katze; dog=Hund; sun=Sonne; moon=Mond; book=Buch; tree=Baum; milk=Milch;
king=König; queen=Königin; friend=Freund; night=Nacht; day=Tag; school=Schule; red=rot; white=weiß; fish=Fisch;
apple=Apfel; cheese=Käse; thank you=danke; hello=hallo; good=gut; sea=Meer
"""
_SPANISH = """
water=agua; bread=pan; house=casa; cat=gato; dog=perro; sun=sol; moon=luna; book=libro; tree=árbol; milk=leche;
king=rey; queen=reina; friend=amigo; night=noche; day=día; school=escuela; red=rojo; white=blanco; fish=pez;
apple=manzana; cheese=queso; thank you=gracias; hello=hola; good=bueno; sea=mar
"""

_OPPOSITES = """
hot=cold; big=small; fast=slow; up=down; left=right; day=night; open=closed; full=empty; happy=sad; wet=dry;
hard=soft; light=dark; young=old; rich=poor; strong=weak; clean=dirty; early=late; loud=quiet; near=far; high=low;
inside=outside; love=hate; true=false; first=last; always=never; summer=winter; war=peace; north=south; east=west
"""

_YOUNG = """
dog=puppy; cat=kitten; cow=calf; horse=foal; sheep=lamb; pig=piglet; goat=kid; hen=chick; duck=duckling; goose=gosling;
bear=cub; deer=fawn; frog=tadpole; kangaroo=joey; swan=cygnet; owl=owlet; hare=leveret
"""

_PLURALS = """
mouse=mice; foot=feet; tooth=teeth; goose=geese; man=men; woman=women; child=children; ox=oxen; leaf=leaves;
knife=knives; wolf=wolves; sheep=sheep; city=cities; baby=babies; box=boxes; loaf=loaves
"""

_PAST_TENSES = """
go=went; see=saw; eat=ate; drink=drank; run=ran; sing=sang; swim=swam; write=wrote; read=read; give=gave; take=took;
come=came; think=thought; buy=bought; bring=brought; catch=caught; teach=taught; fly=flew; know=knew; grow=grew;
speak=spoke; break=broke; drive=drove; sleep=slept
"""

_SYMBOLS = """
gold=Au; silver=Ag; iron=Fe; copper=Cu; tin=Sn; lead=Pb; sodium=Na; potassium=K; hydrogen=H; helium=He; carbon=C;
nitrogen=N; oxygen=O; calcium=Ca; zinc=Zn; mercury=Hg; neon=Ne; sulfur=S; magnesium=Mg; chlorine=Cl
"""

_CURRENCIES = """
Japan=yen; England=pound; India=rupee; China=yuan; Russia=rouble; Mexico=peso; Brazil=real; Poland=zloty;
Switzerland=franc; Thailand=baht; Vietnam=dong; Turkey=lira; Sweden=krona; South Africa=rand; Hungary=forint;
South Korea=won; Germany=euro; Canada=dollar
"""


PLAIN_ENGLISH = """
The train was late this morning, so we walked to the station and had a cup of coffee while we waited for it.
She opened the window and looked out over the garden, where the children were playing in the first light of the day.
If you want to learn how something works, take it apart, write down what you see, and put it together again.
There is nothing better than a long walk in the mountains when the weather is good and the paths are dry.
He asked me a simple question: what would you do if you had more time? I could not give him an answer then.
Please describe the image in one sentence, and tell me which colours and shapes you can see in it.
A computer is a machine that follows instructions; a program is a list of those instructions, one after another.
They have lived in the same house for thirty years, and their neighbours have been their friends for most of them.
You are a helpful assistant. Answer each question briefly. Thank you for your help, that was very useful to me.
Water boils when it is hot enough, and it turns into ice when the temperature falls below the freezing point.
When the rain had stopped, people came out of their homes again and the market in the old town began to fill.
Our teacher said that reading a little every day is the easiest way of learning a language and keeping it.
I think we should start with the small problems first, because they are often part of the larger ones.
The history of the world is also a history of trade: of ships, roads, letters, numbers and money.
Yes, it is. No, it is not. I do not know. Can you say that again? Here are 10 examples, 25 pages and 3,500 words.
"""


@dataclass(frozen=True)
class Fact:
    """One fact: `prompt` continues with `" " + answer + "."`; as a chat, `question` is answered by `answer + "."`."""

    topic: str
    prompt: str
    answer: str
    question: str


def _pairs(table: str) -> list[tuple[str, str]]:
    """Read a `key=value; key=value` table."""
    items = (entry.strip().split("=") for entry in table.strip().split(";"))
    return [(key, value) for key, value in items]


def _pair_facts(topic: str, table: str, prompt: str, question: str) -> list[Fact]:
    """One fact per entry of `table`, its key filled into the `{}` of both patterns."""
    return [Fact(topic, prompt.format(key), value, question.format(key)) for key, value in _pairs(table)]


def _order_facts(topic: str, unit: str, names: str) -> list[Fact]:
    """What comes after and before each name of a cyclic order."""
    order = names.split()
    facts = []
    for i, name in enumerate(order):
        after, before = order[(i + 1) % len(order)], order[i - 1]
        facts.append(Fact(topic, f"The {unit} after {name} is", after, f"Which {unit} comes after {name}?"))
        facts.append(Fact(topic, f"The {unit} before {name} is", before, f"Which {unit} comes before {name}?"))
    return facts


def all_facts() -> list[Fact]:
    """All facts, in a fixed order; every prompt and every question occurs once."""
    facts = _pair_facts("capitals", _CAPITALS, "The capital of {} is", "What is the capital of {}?")
    for line in _PLANETS.strip().splitlines():
        prompt, answer, question = line.split("=")
        facts.append(Fact("planets", prompt, answer, question))
    for ordinal, planet in zip(_ORDINALS.split(), _PLANET_ORDER.split(), strict=True):
        prompt = f"The {ordinal} planet from the Sun is"
        facts.append(Fact("planets", prompt, planet, f"Which is the {ordinal} planet from the Sun?"))
    for a in range(10):
        for b in range(10):
            facts.append(Fact("sums", f"{a} + {b} =", str(a + b), f"What is {a} + {b}?"))
    facts += _pair_facts("colours", _COLOURS, "The colour of {} is", "What is the colour of {}?")
    for language, table in (("French", _FRENCH), ("German", _GERMAN), ("Spanish", _SPANISH)):
        prompt, question = f"The {language} word for {{}} is", f"What is the {language} word for {{}}?"
        facts += _pair_facts(language, table, prompt, question)
    both_ways = _OPPOSITES + ";" + ";".join(f"{b}={a}" for a, b in _pairs(_OPPOSITES))
    facts += _pair_facts("opposites", both_ways, "The opposite of {} is", "What is the opposite of {}?")
    facts += _order_facts("days", "day", _DAYS)
    facts += _order_facts("months", "month", _MONTHS)
    facts += _pair_facts("young animals", _YOUNG, "A young {} is called a", "What is a young {} called?")
    facts += _pair_facts("plurals", _PLURALS, "The plural of {} is", "What is the plural of {}?")
    facts += _pair_facts("past tenses", _PAST_TENSES, "The past tense of {} is", "What is the past tense of {}?")
    facts += _pair_facts("symbols", _SYMBOLS, "The chemical symbol of {} is", "What is the chemical symbol of {}?")
    facts += _pair_facts("currencies", _CURRENCIES, "The currency of {} is the", "What is the currency of {}?")
    for field in ("prompt", "question"):
        values = [getattr(fact, field) for fact in facts]
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ValueError(f"every {field} must occur once; repeated: {repeated}")
    return facts
