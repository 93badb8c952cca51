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

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from fedmpt_core.data.manifest_rows import SPLITS, ManifestError, ManifestRow, Problems
from fedmpt_core.data.public.folder_checks import LeftOut, Progress, present
from fedmpt_core.data.public.instances import Instances, read_instances
from fedmpt_core.data.public.splits import VAL_SHARE, drawn

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


def objects365_rows(
    folder: str | Path,
    splits: Sequence[str] = SPLITS,
    *,
    val_share: float = VAL_SHARE,
    seed: int = 0,
    left_out: LeftOut | None = None,
    on_progress: Progress | None = None,
) -> Iterator[ManifestRow]:
    """One row per picture, with absolute paths, by file and id; as `coco.coco_rows`.

    Args:
        folder: the folder that holds `train` and `val`.
        splits: which of `train`, `val`, `test` to read; a file that none of them needs may be missing.
        val_share: share of the official train list that becomes `val`, (0, 1).
        seed: which pictures become `val`.
        left_out: as in `folder_checks.present`.
        on_progress: called with (bytes done, bytes in all) for each annotation file.

    Yields:
        The rows, their labels in the order of `CLASSES`. They are good only once the iterator has ended.

    Raises:
        ManifestError: the folder cannot be used; names every problem.
        ValueError: the share is out of range.
    """
    problems = Problems("the Objects365 folder")
    base = Path(folder).absolute()
    names: set[str] = set()
    for part, needed in (("train", ("train", "val")), ("val", ("test",))):
        if not set(needed) & set(splits):
            continue
        found = _read(base, part, problems, on_progress)
        own = {PurePosixPath(name).name for name in found.files}
        if len(own) < len(found.files) or own & names:
            problems.add(found.source, "lists a picture that this file or the train file lists too")
        names |= own
        drawn_ids = drawn([str(n) for n in found.ids], val_share, seed) if part == "train" else frozenset()

        def split_of(number: int, part: str = part, val: frozenset[str] = drawn_ids) -> str:
            split = "test" if part == "val" else "val" if str(number) in val else "train"
            return split if split in splits else ""

        rows = found.rows(CLASSES, _paths(base / part, found, problems), split_of)
        yield from present(rows, problems, left_out)
    problems.refuse_any()


def _read(base: Path, part: str, problems: Problems, on_progress: Progress | None) -> Instances:
    name = f"zhiyuan_objv2_{part}.json"
    places = [base / "annotations" / name, base / part / name]
    path = next((place for place in places if place.is_file()), places[0])
    found = read_instances(path, _COLUMNS, f"unpack {name} there, or into {base / part}", problems, on_progress)
    if found is None:
        raise ManifestError(problems)
    return found


def _paths(pictures: Path, found: Instances, problems: Problems) -> Callable[[str], str]:
    """From `images/v1/patch8/NAME.jpg` to where such a picture lies: at that path below the folder, or in `patch8`."""
    as_listed = bool(found.files) and (pictures / PurePosixPath(found.files[0]).parts[0]).is_dir()
    if not pictures.is_dir():
        problems.add(str(pictures), "does not exist: unpack the patches there")
        raise ManifestError(problems)

    def path_of(name: str) -> str:
        path = PurePosixPath(name)
        return str(pictures / path if as_listed else pictures / path.parent.name / path.name)

    return path_of
