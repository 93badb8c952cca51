"""Objects365 version 2 -> manifest rows: the official annotations and pictures.

    annotations/zhiyuan_objv2_train.json, zhiyuan_objv2_val.json          or in train/ and val/
    train/patch0/*.jpg .., val/patch0/*.jpg ..                            or train/images/v1/patch0/*.jpg ..

`test` is the official val list. `train` and `val` are the official train list, of which a seeded tenth is `val`, where
thresholds are chosen. Some names in the official files are misspelt, shortened or end in a blank: both that spelling
and the corrected one are accepted, and labels are the corrected words in lower case, since prompts need words.
Version 1 has other classes and is refused.

The train file holds 25 million annotations; it is streamed. Three pictures of it are known to be missing from the
archives: leave missing pictures out explicitly.
"""

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from fedmpt_core.data.manifest_rows import ManifestError, ManifestRow, Problems
from fedmpt_core.data.public.folder import Folder
from fedmpt_core.data.public.instances import Instances, read_instances, split_by_id

# fmt: off
NAMES: tuple[str, ...] = (
    "Person", "Sneakers", "Chair", "Other Shoes", "Hat", "Car", "Lamp", "Glasses", "Bottle", "Desk", "Cup",
    "Street Lights", "Cabinet/shelf", "Handbag/Satchel", "Bracelet", "Plate", "Picture/Frame", "Helmet", "Book",
    "Gloves", "Storage box", "Boat", "Leather Shoes", "Flower", "Bench", "Potted Plant", "Bowl/Basin", "Flag",
    "Pillow", "Boots", "Vase", "Microphone", "Necklace", "Ring", "SUV", "Wine Glass", "Belt", "Moniter/TV",
    "Backpack", "Umbrella", "Traffic Light", "Speaker", "Watch", "Tie", "Trash bin Can", "Slippers", "Bicycle",
    "Stool", "Barrel/bucket", "Van", "Couch", "Sandals", "Bakset", "Drum", "Pen/Pencil", "Bus", "Wild Bird",
    "High Heels", "Motorcycle", "Guitar", "Carpet", "Cell Phone", "Bread", "Camera", "Canned", "Truck",
    "Traffic cone", "Cymbal", "Lifesaver", "Towel", "Stuffed Toy", "Candle", "Sailboat", "Laptop", "Awning", "Bed",
    "Faucet", "Tent", "Horse", "Mirror", "Power outlet", "Sink", "Apple", "Air Conditioner", "Knife",
    "Hockey Stick", "Paddle", "Pickup Truck", "Fork", "Traffic Sign", "Ballon", "Tripod", "Dog", "Spoon", "Clock",
    "Pot", "Cow", "Cake", "Dinning Table", "Sheep", "Hanger", "Blackboard/Whiteboard", "Napkin", "Other Fish",
    "Orange/Tangerine", "Toiletry", "Keyboard", "Tomato", "Lantern", "Machinery Vehicle", "Fan",
    "Green Vegetables", "Banana", "Baseball Glove", "Airplane", "Mouse", "Train", "Pumpkin", "Soccer", "Skiboard",
    "Luggage", "Nightstand", "Tea pot", "Telephone", "Trolley", "Head Phone", "Sports Car", "Stop Sign", "Dessert",
    "Scooter", "Stroller", "Crane", "Remote", "Refrigerator", "Oven", "Lemon", "Duck", "Baseball Bat",
    "Surveillance Camera", "Cat", "Jug", "Broccoli", "Piano", "Pizza", "Elephant", "Skateboard", "Surfboard",
    "Gun", "Skating and Skiing shoes", "Gas stove", "Donut", "Bow Tie", "Carrot", "Toilet", "Kite", "Strawberry",
    "Other Balls", "Shovel", "Pepper", "Computer Box", "Toilet Paper", "Cleaning Products", "Chopsticks",
    "Microwave", "Pigeon", "Baseball", "Cutting/chopping Board", "Coffee Table", "Side Table", "Scissors",
    "Marker", "Pie", "Ladder", "Snowboard", "Cookies", "Radiator", "Fire Hydrant", "Basketball", "Zebra", "Grape",
    "Giraffe", "Potato", "Sausage", "Tricycle", "Violin", "Egg", "Fire Extinguisher", "Candy", "Fire Truck",
    "Billards", "Converter", "Bathtub", "Wheelchair", "Golf Club", "Briefcase", "Cucumber", "Cigar/Cigarette",
    "Paint Brush", "Pear", "Heavy Truck", "Hamburger", "Extractor", "Extention Cord", "Tong", "Tennis Racket",
    "Folder", "American Football", "earphone", "Mask", "Kettle", "Tennis", "Ship", "Swing", "Coffee Machine",
    "Slide", "Carriage", "Onion", "Green beans", "Projector", "Frisbee", "Washing Machine/Drying Machine",
    "Chicken", "Printer", "Watermelon", "Saxophone", "Tissue", "Toothbrush", "Ice cream", "Hotair ballon", "Cello",
    "French Fries", "Scale", "Trophy", "Cabbage", "Hot dog", "Blender", "Peach", "Rice", "Wallet/Purse",
    "Volleyball", "Deer", "Goose", "Tape", "Tablet", "Cosmetics", "Trumpet", "Pineapple", "Golf Ball", "Ambulance",
    "Parking meter", "Mango", "Key", "Hurdle", "Fishing Rod", "Medal", "Flute", "Brush", "Penguin", "Megaphone",
    "Corn", "Lettuce", "Garlic", "Swan", "Helicopter", "Green Onion", "Sandwich", "Nuts", "Speed Limit Sign",
    "Induction Cooker", "Broom", "Trombone", "Plum", "Rickshaw", "Goldfish", "Kiwi fruit", "Router/modem",
    "Poker Card", "Toaster", "Shrimp", "Sushi", "Cheese", "Notepaper", "Cherry", "Pliers", "CD", "Pasta", "Hammer",
    "Cue", "Avocado", "Hamimelon", "Flask", "Mushroon", "Screwdriver", "Soap", "Recorder", "Bear", "Eggplant",
    "Board Eraser", "Coconut", "Tape Measur/ Ruler", "Pig", "Showerhead", "Globe", "Chips", "Steak",
    "Crosswalk Sign", "Stapler", "Campel", "Formula 1", "Pomegranate", "Dishwasher", "Crab", "Hoverboard",
    "Meat ball", "Rice Cooker", "Tuba", "Calculator", "Papaya", "Antelope", "Parrot", "Seal", "Buttefly",
    "Dumbbell", "Donkey", "Lion", "Urinal", "Dolphin", "Electric Drill", "Hair Dryer", "Egg tart", "Jellyfish",
    "Treadmill", "Lighter", "Grapefruit", "Game board", "Mop", "Radish", "Baozi", "Target", "French",
    "Spring Rolls", "Monkey", "Rabbit", "Pencil Case", "Yak", "Red Cabbage", "Binoculars", "Asparagus", "Barbell",
    "Scallop", "Noddles", "Comb", "Dumpling", "Oyster", "Table Teniis paddle", "Cosmetics Brush/Eyeliner Pencil",
    "Chainsaw", "Eraser", "Lobster", "Durian", "Okra", "Lipstick", "Cosmetics Mirror", "Curling", "Table Tennis",
)
# fmt: on
"""The names in the official files by ascending id, without blanks at their ends."""

_CORRECTED = {
    "Moniter/TV": "monitor or tv",
    "Trash bin Can": "trash bin",
    "Bakset": "basket",
    "Ballon": "balloon",
    "Dinning Table": "dining table",
    "Soccer": "soccer ball",
    "Skiboard": "skis",
    "Billards": "billiards",
    "Extention Cord": "extension cord",
    "Tennis": "tennis ball",
    "Hotair ballon": "hot air balloon",
    "Mushroon": "mushroom",
    "Tape Measur/ Ruler": "tape measure or ruler",
    "Campel": "camel",
    "Formula 1": "formula 1 car",
    "Buttefly": "butterfly",
    "French": "french horn",
    "Noddles": "noodles",
    "Table Teniis paddle": "table tennis paddle",
    "Curling": "curling stone",
    "Table Tennis": "table tennis ball",
}
CLASSES = tuple(_CORRECTED.get(name, name).lower().replace("/", " or ") for name in NAMES)

_COLUMNS = {spelling.casefold(): c for c, pair in enumerate(zip(NAMES, CLASSES, strict=True)) for spelling in pair}


def rows(folder: Folder) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, by file and id; good only once the iterator has ended.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share of `val` is out of range.
    """
    names: set[str] = set()
    for part, needed in (("train", ("train", "val")), ("val", ("test",))):
        if not folder.asks(*needed):
            continue
        instances = _read(folder, part)
        own = {PurePosixPath(name).name for name in instances.files}
        if len(own) < len(instances.files) or own & names:
            folder.problems.add(instances.source, "lists a picture that this file or the train file lists too")
        names |= own
        path_of = _paths(folder.base / part, instances, folder.problems)
        yield from instances.rows(CLASSES, path_of, split_by_id(folder, instances, test=part == "val"))


def _read(folder: Folder, part: str) -> Instances:
    name = f"zhiyuan_objv2_{part}.json"
    places = [folder.base / "annotations" / name, folder.base / part / name]
    path = next((place for place in places if place.is_file()), places[0])
    hint = f"unpack {name} there, or into {folder.base / part}"
    instances = read_instances(path, _COLUMNS, hint, folder.problems, folder.on_progress)
    if instances is None:
        raise ManifestError(folder.problems)
    return instances


def _paths(pictures: Path, instances: Instances, problems: Problems) -> Callable[[str], str]:
    """From `images/v1/patch8/NAME.jpg` to where such a picture lies: at that path below the folder, or in `patch8`."""
    as_listed = bool(instances.files) and (pictures / PurePosixPath(instances.files[0]).parts[0]).is_dir()
    if not pictures.is_dir():
        problems.add(str(pictures), "does not exist: unpack the patches there")
        raise ManifestError(problems)

    def path_of(name: str) -> str:
        path = PurePosixPath(name)
        return str(pictures / path if as_listed else pictures / path.parent.name / path.name)

    return path_of
