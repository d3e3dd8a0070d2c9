"""Word lists behind the procedural corpus; data only."""

NAMES = (
    "Adam Aisha Alma Amir Ana Anton Arjun Astrid Ben Bella Boris Bruno Carla Carlos Cedric Chloe Clara Dana Daniel "
    "David Diego Dora Edith Elena Elif Emil Emma Erik Esther Eva Fatima Felix Fiona Frank Freya George Gina Grace "
    "Greta Hana Hannah Harold Hassan Helen Henry Hugo Ida Igor Ines Irene Isaac Ivan Jack Jana Jasper Joan Jonas "
    "Julia Kai Karen Karim Kofi Laila Lara Lars Lena Leo Liam Lina Louis Lucas Lucy Magda Marco Maria Martin Maya "
    "Mei Mia Milan Mona Nadia Nils Nina Noah Nora Olga Oliver Omar Oscar Paula Pavel Peter Petra Priya Quinn Rahul "
    "Raj Rita Robert Rosa Ruth Sam Samir Sara Simon Sofia Stefan Tara Theo Thomas Tina Tom Uma Vera Victor Wanda "
    "Will Xenia Yara Yusuf Zoe"
).split()

CITIES = (
    "Accra Athens Bergen Berlin Bogota Boston Cairo Chicago Cork Dakar Delhi Denver Dublin Geneva Hanoi Helsinki Kyoto "
    "Lagos Leeds Lima Lisbon London Lyon Madrid Malmo Milan Nairobi Naples Oslo Ottawa Paris Porto Prague Quito Riga "
    "Rome Seoul Sofia Sydney Tokyo Toronto Turin Vienna Warsaw York Zurich"
).split()

# (goods, one container, several containers)
PACKED_GOODS = (
    ("apples", "crate", "crates"),
    ("pears", "basket", "baskets"),
    ("plums", "basket", "baskets"),
    ("lemons", "bag", "bags"),
    ("oranges", "box", "boxes"),
    ("onions", "sack", "sacks"),
    ("potatoes", "sack", "sacks"),
    ("carrots", "bunch", "bunches"),
    ("eggs", "carton", "cartons"),
    ("jars", "crate", "crates"),
    ("bottles", "crate", "crates"),
    ("cans", "tray", "trays"),
    ("muffins", "tray", "trays"),
    ("cookies", "tin", "tins"),
    ("biscuits", "packet", "packets"),
    ("candles", "box", "boxes"),
    ("pencils", "box", "boxes"),
    ("crayons", "pack", "packs"),
    ("markers", "pack", "packs"),
    ("notebooks", "stack", "stacks"),
    ("books", "shelf", "shelves"),
    ("magazines", "pile", "piles"),
    ("stamps", "album", "albums"),
    ("cards", "deck", "decks"),
    ("marbles", "bag", "bags"),
    ("beads", "jar", "jars"),
    ("buttons", "tin", "tins"),
    ("screws", "drawer", "drawers"),
    ("nails", "drawer", "drawers"),
    ("bricks", "pallet", "pallets"),
    ("tiles", "pallet", "pallets"),
    ("planks", "stack", "stacks"),
    ("bulbs", "carton", "cartons"),
    ("batteries", "pack", "packs"),
    ("cables", "box", "boxes"),
    ("mugs", "shelf", "shelves"),
    ("plates", "rack", "racks"),
    ("chairs", "row", "rows"),
    ("seedlings", "tray", "trays"),
    ("tulips", "bed", "beds"),
    ("roses", "bucket", "buckets"),
    ("shirts", "rack", "racks"),
    ("socks", "drawer", "drawers"),
    ("towels", "basket", "baskets"),
    ("balls", "net", "nets"),
    ("photos", "folder", "folders"),
    ("letters", "bundle", "bundles"),
    ("tickets", "roll", "rolls"),
)

# (one piece, several pieces) of what is sold singly
SHOP_GOODS = (
    ("lamp", "lamps"),
    ("mug", "mugs"),
    ("pen", "pens"),
    ("notebook", "notebooks"),
    ("scarf", "scarves"),
    ("hat", "hats"),
    ("shirt", "shirts"),
    ("candle", "candles"),
    ("plant", "plants"),
    ("poster", "posters"),
    ("puzzle", "puzzles"),
    ("book", "books"),
    ("ticket", "tickets"),
    ("cake", "cakes"),
    ("pie", "pies"),
    ("sandwich", "sandwiches"),
    ("salad", "salads"),
    ("juice", "juices"),
    ("coffee", "coffees"),
    ("towel", "towels"),
    ("cushion", "cushions"),
    ("basket", "baskets"),
    ("bowl", "bowls"),
    ("plate", "plates"),
    ("spoon", "spoons"),
    ("ruler", "rulers"),
    ("brush", "brushes"),
    ("bucket", "buckets"),
    ("hammer", "hammers"),
    ("rope", "ropes"),
    ("kite", "kites"),
    ("ball", "balls"),
    ("map", "maps"),
    ("frame", "frames"),
    ("clock", "clocks"),
    ("bag", "bags"),
)

PLACES = (
    "shop market bakery library school museum garden farm office factory warehouse workshop kitchen station harbour "
    "cinema theatre hotel studio gallery hospital cafe gym greenhouse"
).split()

COUNTED_SPOTS = (
    ("hall", "seats"),
    ("theatre", "seats"),
    ("cinema", "seats"),
    ("car park", "spaces"),
    ("stadium", "seats"),
)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January February March April May June July August September October November December").split()
MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

VEHICLES = ("train", "bus", "car", "truck", "van", "ship", "tram", "coach")
INGREDIENTS = (
    "flour",
    "sugar",
    "butter",
    "rice",
    "oats",
    "milk",
    "cheese",
    "pasta",
    "lentils",
    "cocoa",
    "honey",
    "yoghurt",
)
DISHES = (
    "soup",
    "bread",
    "pancakes",
    "stew",
    "curry",
    "a pie",
    "a cake",
    "porridge",
    "a salad",
    "risotto",
    "muffins",
    "sauce",
)

JOBS = (
    "teacher doctor farmer baker nurse painter lawyer driver editor plumber gardener manager student engineer artist "
    "writer singer tailor carpenter librarian guide clerk cook pilot"
).split()

ADJECTIVES = (
    "old new small large red blue green yellow broken heavy light clean dirty wooden empty quiet tall narrow wide "
    "bright dark soft cheap fancy round square rusty simple strange famous"
).split()

# (base, third person, past, past participle): verbs that take a thing as their object
VERBS = (
    ("paint", "paints", "painted", "painted"),
    ("repair", "repairs", "repaired", "repaired"),
    ("clean", "cleans", "cleaned", "cleaned"),
    ("move", "moves", "moved", "moved"),
    ("open", "opens", "opened", "opened"),
    ("close", "closes", "closed", "closed"),
    ("carry", "carries", "carried", "carried"),
    ("check", "checks", "checked", "checked"),
    ("count", "counts", "counted", "counted"),
    ("deliver", "delivers", "delivered", "delivered"),
    ("describe", "describes", "described", "described"),
    ("design", "designs", "designed", "designed"),
    ("draw", "draws", "drew", "drawn"),
    ("find", "finds", "found", "found"),
    ("fix", "fixes", "fixed", "fixed"),
    ("hide", "hides", "hid", "hidden"),
    ("hold", "holds", "held", "held"),
    ("label", "labels", "labelled", "labelled"),
    ("lose", "loses", "lost", "lost"),
    ("make", "makes", "made", "made"),
    ("measure", "measures", "measured", "measured"),
    ("order", "orders", "ordered", "ordered"),
    ("pack", "packs", "packed", "packed"),
    ("photograph", "photographs", "photographed", "photographed"),
    ("pick", "picks", "picked", "picked"),
    ("return", "returns", "returned", "returned"),
    ("sell", "sells", "sold", "sold"),
    ("send", "sends", "sent", "sent"),
    ("show", "shows", "showed", "shown"),
    ("steal", "steals", "stole", "stolen"),
    ("store", "stores", "stored", "stored"),
    ("take", "takes", "took", "taken"),
    ("test", "tests", "tested", "tested"),
    ("throw", "throws", "threw", "thrown"),
    ("wash", "washes", "washed", "washed"),
    ("weigh", "weighs", "weighed", "weighed"),
    ("wrap", "wraps", "wrapped", "wrapped"),
    ("choose", "chooses", "chose", "chosen"),
    ("break", "breaks", "broke", "broken"),
    ("bring", "brings", "brought", "brought"),
)

# (singular, plural) of things a sentence can be about
THINGS = (
    ("box", "boxes"),
    ("chair", "chairs"),
    ("table", "tables"),
    ("door", "doors"),
    ("window", "windows"),
    ("letter", "letters"),
    ("picture", "pictures"),
    ("bicycle", "bicycles"),
    ("basket", "baskets"),
    ("bottle", "bottles"),
    ("lamp", "lamps"),
    ("map", "maps"),
    ("parcel", "parcels"),
    ("report", "reports"),
    ("shelf", "shelves"),
    ("suitcase", "suitcases"),
    ("tent", "tents"),
    ("tool", "tools"),
    ("vase", "vases"),
    ("wall", "walls"),
    ("watch", "watches"),
    ("boat", "boats"),
    ("bench", "benches"),
    ("camera", "cameras"),
    ("carpet", "carpets"),
    ("clock", "clocks"),
    ("coat", "coats"),
    ("cup", "cups"),
    ("fence", "fences"),
    ("key", "keys"),
    ("mirror", "mirrors"),
    ("notebook", "notebooks"),
    ("piano", "pianos"),
    ("plate", "plates"),
    ("poster", "posters"),
    ("radio", "radios"),
    ("rope", "ropes"),
    ("sign", "signs"),
    ("stone", "stones"),
    ("toy", "toys"),
)

FRUIT_AND_MORE = (
    "apple apricot banana barley basil bean beet bread butter cabbage carrot celery cheese cherry coffee corn cream "
    "cucumber date egg fig fish garlic ginger grape honey jam kale leek lemon lentil lettuce lime mango melon milk "
    "mint mushroom mustard nut oat olive onion orange pea peach pear pepper plum potato radish rice salt spinach "
    "sugar tea thyme tomato walnut yam"
).split()
