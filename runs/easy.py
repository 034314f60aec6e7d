"""Easy questions with two options, which a small language model can answer by itself: `--task jsonl --data OUT/FILE`.

    kinds.jsonl      Which of these is an animal? (A) chair (B) fox
    fresh.jsonl      the same with 646 other words and without the test words of kinds.jsonl: for more training
    capitals.jsonl   What is the capital of Chile? (A) Lima (B) Santiago
    opposites.jsonl  Which word means the opposite of "early"? (A) late (B) narrow

The right option is at either place equally often. A group is the right word, the country or the pair of opposites, so
that no answer asked for in a test was asked for in training.

    python runs/easy.py OUT_DIR
"""

import functools
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tasks  # noqa: E402
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
FRESH = {  # words that KINDS does not have, of its kinds and of others
    "an animal": "buffalo bison antelope moose elk gazelle hyena jackal coyote raccoon skunk weasel ferret porcupine "
    "sloth koala wombat walrus seal armadillo anteater baboon chimpanzee orangutan lemur gerbil rat mole bat llama "
    "alpaca mule reindeer warthog tapir meerkat mongoose lynx puma jaguar cougar bobcat alligator iguana chameleon "
    "gecko python cobra toad newt salamander tortoise",
    "a bird": "hawk falcon vulture raven crow magpie robin finch canary woodpecker hummingbird pelican flamingo "
    "stork heron seagull albatross ostrich emu peacock pheasant quail turkey dove kingfisher nightingale lark thrush "
    "cuckoo",
    "an insect": "mosquito wasp beetle cricket grasshopper dragonfly moth ladybug cockroach termite flea hornet "
    "locust firefly mantis",
    "a fish": "cod herring sardine mackerel carp pike perch haddock halibut eel piranha anchovy catfish goldfish "
    "swordfish",
    "a fruit": "peach plum kiwi guava lychee tangerine clementine mulberry gooseberry cantaloupe pomelo persimmon "
    "raisin",
    "a vegetable": "beetroot kale cucumber eggplant artichoke pumpkin okra yam shallot chard",
    "a drink": "soda cider rum gin brandy espresso cappuccino milkshake smoothie tequila cola",
    "a tool": "pincers tweezers hacksaw clamp jigsaw trowel hoe pitchfork hatchet tongs sledgehammer lathe",
    "a color": "turquoise crimson scarlet maroon teal cyan indigo",
    "a country": "Netherlands Bulgaria Croatia Serbia Slovakia Slovenia Estonia Latvia Lithuania Albania Belarus "
    "Moldova Cyprus Malta Syria Israel Lebanon Yemen Oman Qatar Kuwait Afghanistan Bangladesh Myanmar Malaysia "
    "Singapore Philippines Mongolia Cambodia Laos Algeria Tunisia Libya Sudan Somalia Ghana Senegal Mali Niger "
    "Cameroon Angola Zambia Zimbabwe Botswana Namibia Tanzania Uganda Rwanda Mozambique Madagascar Ecuador Bolivia "
    "Paraguay Uruguay Venezuela Panama Guatemala Honduras Nicaragua Jamaica Haiti",
    "a city": "London Chicago Boston Seattle Houston Detroit Toronto Montreal Vancouver Sydney Melbourne Mumbai "
    "Shanghai Osaka Kyoto Istanbul Barcelona Milan Naples Venice Munich Hamburg Zurich Geneva Lyon Marseille "
    "Manchester Liverpool Glasgow Edinburgh Dubai Karachi Lagos Casablanca Philadelphia Denver Miami Dallas Atlanta "
    "Baltimore",
    "a month": "January February April June July August September October November December",
    "a day of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "a planet": "Mars Jupiter Saturn Uranus Neptune",
    "a shape": "triangle rectangle circle hexagon pentagon octagon cube sphere cylinder cone pyramid oval rhombus "
    "trapezoid",
    "a vehicle": "sailboat ferry kayak raft sled minivan convertible jeep locomotive bulldozer moped tricycle "
    "unicycle glider rocket spaceship carriage wagon trolley",
    "a musical instrument": "viola bagpipe lute lyre bugle piccolo bongo tambourine cymbal synthesizer zither marimba",
    "a piece of furniture": "cabinet ottoman recliner nightstand futon bookcase sideboard crib loveseat",
    "a piece of clothing": "cardigan blazer tuxedo kimono poncho apron tie belt boots sandals sneakers slippers "
    "mittens leggings tights cap beanie beret bikini bathrobe raincoat overalls waistcoat",
    "a metal": "silver chromium magnesium lithium sodium potassium calcium uranium brass",
    "a sport": "softball lacrosse surfing snowboarding skateboarding sailing diving handball polo bowling darts "
    "curling taekwondo kickboxing triathlon",
    "a part of the body": "eyebrow eyelid lip tongue tooth throat chest rib spine hip thigh toe heel shin cheek "
    "forehead skull kidney bladder pancreas intestine brain",
    "a job": "secretary cashier surgeon pharmacist veterinarian psychologist economist translator photographer "
    "painter sculptor actor musician singer dancer gardener janitor bricklayer welder miner fisherman sailor "
    "detective judge politician diplomat professor scientist biologist chemist astronaut bartender hairdresser "
    "jeweler locksmith optician",
    "a language": "Turkish Greek Hebrew Persian Urdu Bengali Tamil Vietnamese Thai Indonesian Finnish Danish "
    "Norwegian Hungarian Czech Romanian Ukrainian Swahili Zulu Icelandic",
    "a programming language": "Java JavaScript Ruby Perl Haskell Fortran COBOL Kotlin TypeScript PHP Lua Erlang "
    "Scala Pascal",
    "a flower": "chrysanthemum hydrangea lavender geranium petunia begonia snapdragon hyacinth azalea magnolia "
    "buttercup bluebell snowdrop pansy",
    "a tree": "oak maple birch willow spruce cedar sequoia poplar elm eucalyptus sycamore redwood",
    "a building": "palace mosque monastery synagogue warehouse garage apartment bungalow mansion villa lighthouse "
    "windmill greenhouse hangar stadium courthouse supermarket",
    "a relative": "grandson granddaughter stepmother stepfather stepsister stepbrother husband wife",
    "a spice": "cinnamon turmeric paprika nutmeg cumin saffron cardamom oregano basil thyme rosemary",
    "a gemstone": "diamond ruby emerald sapphire topaz amethyst opal garnet jade",
    "a disease": "malaria cholera tuberculosis influenza measles diabetes cancer smallpox pneumonia asthma leprosy",
    "a weapon": "sword dagger rifle pistol cannon spear bayonet crossbow grenade musket machete revolver",
    "a kitchen utensil": "spoon fork knife spatula ladle whisk saucepan kettle colander",
    "a dessert": "cake pudding brownie cupcake tiramisu cheesecake cookie doughnut custard pie",
    "a school subject": "mathematics history geography physics chemistry biology algebra literature geometry",
    "a fabric": "cotton silk wool linen denim velvet polyester nylon satin flannel",
    "a toy": "doll teddy kite yo-yo puzzle lego rattle marbles",
    "a mathematical operation": "addition subtraction multiplication division",
    "a number": "seven eleven twenty forty hundred thousand million nine twelve",
    "a season": "winter summer autumn",
    "an emotion": "anger fear joy sadness jealousy disgust guilt shame envy grief",
}
CLOSE = (  # a word of one of these kinds may be of another of them too, so no question has options of both
    "a bird / a fish / an animal / an insect, a kitchen utensil / a tool / a weapon, a country / a language, a city / "
    "a country, a flower / a tree, a dessert / a fruit / a tree, a spice / a vegetable, a color / a gemstone / a "
    "metal, a color / a flower, a fabric / a piece of clothing, a fabric / an animal, a fruit / a vegetable, a metal "
    "/ a planet, a city / a programming language, a country / a programming language, a toy / a vehicle, a sport / a "
    "toy, a city / a month, a building / a vehicle, a color / a fruit, a flower / a spice, a drink / a fruit, a sport "
    "/ a vehicle, a mathematical operation / a school subject, a kitchen utensil / a piece of furniture, a "
    "programming language / an animal, a sport / an insect, a gemstone / a programming language, a dessert / a drink"
)
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


def wrong_options(unseen: set[str]) -> dict[str, list[list[str]]]:
    """{kind of FRESH: the words of each kind that is not close to it}, without the words of KINDS in `unseen`."""
    words = {name: words.split() for name, words in FRESH.items()}
    for name, known in KINDS.items():
        words[name] = words.get(name, []) + [word for word in known.split() if word not in unseen]
    close = [{*some.strip().split(" / ")} for some in CLOSE.split(",")]
    return {a: [words[b] for b in words if a != b and not any({a, b} <= some for some in close)] for a in FRESH}


def fresh(rng: random.Random, asked: list[tuple[str, str]], wrong: dict) -> tuple[str, str, str, str]:
    """asked: kinds and their words. wrong: of wrong_options."""
    name, right = rng.choice(asked)
    return f"Which of these is {name}?", right, rng.choice(rng.choice(wrong[name])), right


def questions(name: str, draw: Callable, count: int, seed: int) -> list[dict]:
    rng, made = random.Random(seed), {}
    while len(made) < count:
        text, right, wrong, group = draw(rng)
        gold = len(made) % 2
        row = {"parts": [text], "options": [wrong, right] if gold else [right, wrong], "gold": gold, "group": group}
        made.setdefault((text, right, wrong), row | {"id": f"{name}-{len(made)}"})
    return list(made.values())


@command("easy.py")
def main(argv: list[str]) -> None:
    parser = Parser(prog="easy.py", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write to")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw, count in (("kinds", kind, 2000), ("capitals", capital, 600), ("opposites", opposite, 600)):
        write_jsonl(out / f"{name}.jsonl", questions(name, draw, count, seed=0))
    # The test and fit questions of kinds.jsonl in runs/qwen.sh.
    _, parts = tasks.load_splits({"jsonl": str(out / "kinds.jsonl")}, {"test": 300, "fit": 150}, False)
    unseen = {question.group for part in parts.values() for question in part}
    asked = [(name, word) for name, words in FRESH.items() for word in words.split()]
    draw = functools.partial(fresh, asked=asked, wrong=wrong_options(unseen))
    write_jsonl(out / "fresh.jsonl", questions("fresh", draw, 3000, seed=1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
