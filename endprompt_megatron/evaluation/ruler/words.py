"""English words for the keys and word lists of RULER's tasks. They are fixed here, so samples do not depend on a package's word list."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    able active agile amber ample ancient angry awake azure bald basic bitter blank bold brave brief bright brisk broad bronze calm candid
    careful casual cheap cheerful chilly civil clean clever cloudy clumsy coarse cold common compact cosy crimson crisp crude curious curly
    daily damp dear deep dense dim distant dizzy double drowsy dry dull dusty eager early easy elegant empty equal exact faint fair famous
    fancy fast fierce final firm flat fluffy fond formal frail frank fresh frosty frozen full funny gentle giant glad gloomy golden grand
    grateful grave green grim happy harsh hasty heavy hidden hollow honest humble hungry icy idle jolly keen kind large late lazy lean
    light likely little lively local lonely loud lucky mellow merry mild misty modest narrow native neat nervous nimble noble noisy normal
    odd olive orange pale patient plain polite precious pretty proud pure purple quick quiet rapid rare ready red remote rich rigid rough
    round royal rude rusty sad scarlet secret sharp shiny short shy silent silver simple sleepy slow small smart smooth sober soft solid
    sour spare stale steady steep stern stiff strange strict strong sturdy subtle sudden sunny sweet swift tall tame tender tense thick thin
    tidy tiny tired tough true ugly upper urban useful usual vague vast violet vivid warm weak wealthy weary weekly wet wide wild wise young
    """
)
NOUNS = _words(
    """
    acorn actor adult album alley anchor angle animal ankle apple apron arch arrow atlas attic aunt autumn award badge bakery balcony ball
    bamboo banana band banjo bank barn barrel basin basket bath beach bead beam bean bear beard beaver bell belt bench berry bicycle bird
    biscuit blanket blossom board boat bone book boot border bottle boulder bowl bracelet branch bread breeze brick bridge broom brother
    brush bucket buffalo builder bulb bus bush butcher butter button cabbage cabin cable cactus cake calendar camel camera canal candle
    canoe canvas captain carpet carrot castle cathedral cattle cave cedar ceiling cellar cement century chain chair chalk chapel cherry
    chess chest chicken chief chimney chisel church cinema circle citizen city clay cliff clock cloth cloud clover coach coast coat coconut
    coffee coin collar colony comb comet compass concert copper coral corner cotton cottage couch cousin cow crab cradle crane crayon creek
    cricket crow crown crystal cup curtain cushion customer cylinder dairy daisy dancer dawn deer dentist desert desk diamond diary dinner
    doctor dog doll dolphin donkey door dragon drawer dress driver drum duck dune eagle earring easel editor elbow elephant elm engine
    envelope evening fabric factory falcon family farm farmer feather fence fern ferry fiddle field finger fisher flag flame flute foam
    forest fork fountain fox friend frog fruit garage garden garlic gate ghost giraffe glacier glass globe glove goat goose grain granite
    grape gravel guest guitar gull hammer harbour harp harvest hat hawk hedge helmet herb hill hinge honey hood horizon horse hospital hotel
    house insect iron island ivory jacket jaguar jar jewel journal judge jug jungle kettle kitchen kite kitten knee knife ladder lake lamp
    lantern laundry lawn lawyer leaf leather lemon letter library lily lion lizard lobster lock lumber magnet maple marble market mattress
    meadow medal melon merchant mill miner mirror monkey monster month moon mosquito moss motor mountain mouse mouth museum mushroom nail
    napkin needle neighbour nephew nest noodle notebook novel nurse oak oasis ocean office onion orchard organ ostrich otter oven owl oyster
    paddle page paint palace panda panther paper parade parcel parent parrot passenger pasture path peach peanut pearl pebble pelican pencil
    pepper piano picture pigeon pillow pilot pine pirate planet plate plum pocket poem poet pond pony porch potato powder prince printer
    pumpkin puppet puzzle quarry queen quilt rabbit radio raft railway rainbow raisin ranch raven razor ribbon rifle river road robin rocket
    roof rope rose ruler saddle sailor salad salmon salt sandal sauce scarf school scissors shadow sheep shelf shell sheriff shirt shovel
    singer sister skirt sledge snail soldier spider spinach sponge spoon squirrel stable stadium statue stone storm stove street student
    sugar suitcase summer swan sword table tailor teacher temple tennis theatre thunder ticket tiger tomato tower tractor train trumpet
    tulip tunnel turkey turtle uncle valley velvet village violin volcano voyage waiter walnut walrus wagon water weasel whale wheat wheel
    whistle widow willow window winter wizard wolf wool zebra
    """
)
VERBS = _words(
    """
    absorb accept admire admit advise agree allow amuse announce appear argue arrange arrive attach avoid bake balance become begin believe
    belong blink blow borrow bounce breathe bring calculate carry catch celebrate chase choose climb collect compare complain confess
    confuse consider contain continue copy cough count crawl decide decorate defend delay deliver depend describe destroy develop disagree
    discover divide double dream drift earn educate embrace encourage enjoy escape examine exist expand explain explore fasten fetch float
    follow forget forgive gather greet guess happen hatch hesitate hope hug imagine improve include increase inform inject injure invent
    invite irritate join juggle jump knit knock laugh launch learn listen manage measure melt mend mention multiply murmur notice obey
    observe obtain offer owe permit persuade plead polish pour practise pray prefer prepare pretend prevent produce promise protect provide
    punish receive recognise reduce refuse regret reject relax rely remain remember remove repair repeat reply request rescue retire return
    rinse sail scatter scold scratch scream settle shiver shrug sigh smile sneeze snore soak solve sparkle squeeze stretch succeed suggest
    support suppose surround suspect swallow tease tempt thank tickle translate travel tremble trust understand unite vanish visit wander
    weave whisper wonder worry wrestle yawn yell
    """
)
WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))


def compounds() -> list[str]:
    """Return every pair of an adjective and a noun. Keys of needles have this form, and word lists use the pairs in addition to WORDS."""
    return [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
