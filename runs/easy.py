"""Easy questions with two options, which a small language model can answer by itself: `--task jsonl --data OUT/FILE`.

    kinds.jsonl      Which of these is an animal? (A) chair (B) fox
    capitals.jsonl   What is the capital of Chile? (A) Lima (B) Santiago
    opposites.jsonl  Which word means the opposite of "early"? (A) late (B) narrow

The right option is at either place equally often. A group is the right word, the country or the pair of opposites, so
that no answer asked for in a test was asked for in training.

    python runs/easy.py OUT_DIR
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run.files import write_jsonl  # noqa: E402
from run.progress import Parser, command  # noqa: E402

KINDS = {
    "an animal": "dog cat horse cow lion tiger rabbit elephant monkey sheep goat pig wolf bear fox deer mouse snake "
    "frog duck whale shark camel donkey zebra giraffe kangaroo squirrel eagle owl panda leopard cheetah hippopotamus "
    "rhinoceros gorilla otter beaver hedgehog badger hamster lizard crocodile turtle dolphin octopus penguin parrot "
    "pigeon sparrow swan goose chicken spider ant bee butterfly salmon tuna trout",
    "a fruit": "apple banana grape pear cherry lemon mango strawberry pineapple melon apricot raspberry blueberry "
    "papaya coconut fig watermelon grapefruit blackberry cranberry nectarine pomegranate",
    "a vegetable": "carrot potato onion cabbage broccoli spinach lettuce cauliflower celery garlic leek radish turnip "
    "asparagus zucchini parsnip",
    "a drink": "tea coffee milk water juice wine beer lemonade whiskey vodka cocoa champagne",
    "a tool": "hammer screwdriver saw wrench drill pliers chisel shovel rake axe sickle crowbar mallet spade pickaxe "
    "sander",
    "a color": "red blue green yellow purple black white pink gray brown beige magenta",
    "a country": "France Germany Japan Brazil Canada Egypt India Italy Spain Mexico Kenya Norway Poland Peru China "
    "Sweden Greece Cuba Chile Vietnam Russia Austria Portugal Ireland Finland Denmark Hungary Belgium Australia "
    "Argentina Colombia Thailand Indonesia Iran Iraq Nigeria Ethiopia Morocco Ukraine Romania Switzerland Iceland "
    "Nepal Pakistan",
    "a vehicle": "car bus train bicycle truck airplane boat motorcycle tram helicopter ship taxi van scooter ambulance "
    "yacht canoe submarine tractor limousine",
    "a musical instrument": "guitar piano violin drum flute trumpet cello harp saxophone clarinet banjo trombone "
    "accordion harmonica xylophone tuba oboe bassoon ukulele mandolin",
    "a piece of furniture": "chair table sofa bed desk wardrobe bookshelf stool bench cupboard armchair dresser couch",
    "a piece of clothing": "shirt jacket trousers skirt sock hat coat glove scarf sweater dress jeans pajamas blouse "
    "hoodie shorts vest",
    "a metal": "iron copper zinc lead tin aluminum nickel steel titanium platinum bronze tungsten",
    "a sport": "football tennis basketball swimming hockey golf boxing baseball volleyball rugby badminton wrestling "
    "karate judo skiing fencing archery cycling gymnastics rowing",
    "a part of the body": "arm leg head nose ear eye mouth finger knee elbow shoulder foot hand neck ankle wrist chin "
    "thumb stomach heart liver lung",
    "a job": "teacher doctor nurse lawyer farmer baker plumber carpenter pilot dentist engineer journalist butcher "
    "tailor librarian architect electrician chef firefighter soldier waiter barber mechanic accountant",
    "a language": "English French German Spanish Italian Russian Chinese Japanese Arabic Portuguese Korean Dutch "
    "Swedish Polish Hindi Latin",
    "a flower": "tulip daisy lily daffodil orchid sunflower carnation dandelion peony poppy jasmine marigold",
    "a building": "house church school hospital castle museum library factory hotel temple theater cathedral "
    "skyscraper barn cottage",
    "a relative": "mother father sister brother aunt uncle cousin grandmother grandfather nephew niece daughter son",
}
CAPITALS = (
    "France Paris, Germany Berlin, Japan Tokyo, Italy Rome, Spain Madrid, Egypt Cairo, Canada Ottawa, China Beijing, "
    "India Delhi, Russia Moscow, Greece Athens, Norway Oslo, Sweden Stockholm, Poland Warsaw, Austria Vienna, "
    "Portugal Lisbon, Ireland Dublin, Cuba Havana, Peru Lima, Chile Santiago, Kenya Nairobi, Iran Tehran, "
    "Iraq Baghdad, Turkey Ankara, Thailand Bangkok, Vietnam Hanoi, Finland Helsinki, Denmark Copenhagen, "
    "Hungary Budapest, Belgium Brussels, Australia Canberra, Colombia Bogota, Brazil Brasilia, Romania Bucharest, "
    "Bulgaria Sofia, Ukraine Kyiv, Indonesia Jakarta, Philippines Manila, Lebanon Beirut, Jordan Amman"
)
OPPOSITES = (
    "hot cold, big small, fast slow, tall short, happy sad, rich poor, light dark, open closed, early late, "
    "strong weak, wet dry, young old, hard soft, loud quiet, full empty, clean dirty, high low, near far, good bad, "
    "thick thin, sharp blunt, brave cowardly, first last, push pull, buy sell, win lose, love hate, start stop, "
    "arrive leave, wide narrow, deep shallow, smooth rough, true false, cheap expensive, safe dangerous"
)


def pairs(text: str) -> list[list[str]]:
    return [pair.split() for pair in text.split(", ")]


def kind(rng: random.Random) -> tuple[str, str, str, str]:
    """The question, its right answer, a wrong one, the group."""
    asked, other = rng.sample(list(KINDS), 2)
    right, wrong = (rng.choice(KINDS[name].split()) for name in (asked, other))
    return f"Which of these is {asked}?", right, wrong, right


def capital(rng: random.Random) -> tuple[str, str, str, str]:
    (country, right), (_, wrong) = rng.sample(pairs(CAPITALS), 2)
    return f"What is the capital of {country}?", right, wrong, f"capital of {country}"  # kinds has groups like Peru


def opposite(rng: random.Random) -> tuple[str, str, str, str]:
    two, other = rng.sample(pairs(OPPOSITES), 2)
    word, right = rng.sample(two, 2)
    return f'Which word means the opposite of "{word}"?', right, rng.choice(other), " ".join(two)


@command("easy.py")
def main(argv: list[str]) -> None:
    parser = Parser(prog="easy.py", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write to")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw, count in (("kinds", kind, 2000), ("capitals", capital, 600), ("opposites", opposite, 600)):
        rng, made = random.Random(0), {}
        while len(made) < count:
            text, right, wrong, group = draw(rng)
            gold = len(made) % 2
            row = {"parts": [text], "options": [wrong, right] if gold else [right, wrong], "gold": gold, "group": group}
            made.setdefault((text, right, wrong), row | {"id": f"{name}-{len(made)}"})
        write_jsonl(out / f"{name}.jsonl", made.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
