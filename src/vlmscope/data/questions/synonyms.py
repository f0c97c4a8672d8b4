"""Words that are too close to stand against each other: a picture of the one shows the other.

The sets are curated by hand for the words of the published data sets. Two words are near-synonyms
if one set holds both; a set also holds what is only a kind of another (a kid is a child, a girl
may be called a kid), because then both answers may be true of one picture.
"""

from __future__ import annotations

from collections import defaultdict

SETS = """
man guy male gentleman
man person
woman person
boy person
girl person
child person
man human
woman human
man adult
woman adult
woman lady female
woman girl female
man boy male
man people
men people persons guys humans
women people persons ladies humans
person human individual people
people humans crowd group persons
child kid toddler infant baby
child boy youngster
child girl youngster
kid boy
kid girl
baby infant newborn
baby boy
baby girl
children kids toddlers
children boys
children girls
kids boys
kids girls
people children
people kids
couple pair people lovers
mother mom mum woman
father dad man
parent mother
parent father
bride woman
groom man bridegroom
businessman man
businesswoman woman
player athlete sportsman footballer
player man
athlete man
athlete woman
player person
athlete person
musician guitarist singer artist performer
musician singer band
singer artist performer
doctor physician medic
worker employee laborer builder
soldier trooper
police policeman officer cop
fisherman angler
car automobile vehicle auto sedan
truck vehicle lorry
bus vehicle coach
vehicle van
bike bicycle cycle
motorcycle motorbike bike scooter
boat ship vessel yacht sailboat
boat canoe kayak
plane airplane aeroplane jet aircraft
train locomotive
cart wagon carriage
dog puppy pup hound
dog pet
cat kitten kitty
cat pet
horse pony foal mare stallion
cow cattle bull calf
cow animal
dog animal
cat animal
horse animal
sheep lamb
chicken hen rooster
bird gull seagull pigeon duck
bear teddy
bunny rabbit
phone telephone cellphone smartphone mobile
computer laptop notebook pc
television tv screen
photo picture photograph image selfie
photo portrait
camera lens
couch sofa settee
sofa chair
chair seat armchair stool
bench seat
table desk counter
bed mattress
rug carpet mat
cup mug glass
glass drink
bottle drink
plate dish
bag handbag purse backpack
suitcase luggage bag
hat cap helmet
shirt tshirt t-shirt blouse top
jacket coat
pants trousers jeans
clothes clothing outfit
dress gown
sunglasses glasses spectacles eyeglasses
house home building
building skyscraper tower
road street path way
street sidewalk pavement
road highway
path trail
sea ocean water
lake water pond
river stream water creek
beach shore coast seaside
beach sand
beach sea
beach ocean
field meadow pasture
grass lawn
grass field
field ground
forest woods woodland trees
hill mountain
rock stone boulder
stone pebble
garden yard backyard
floor ground
store shop market
meal food dinner lunch
food snack
wave surf
book novel
book magazine
paper document
present gift
stairs steps staircase
soccer football
bathroom restroom toilet
bathroom washroom
room bedroom
room kitchen
room bathroom
couch loveseat
fridge refrigerator
stove oven
talk speak chat converse discuss say
talk tell
look watch see view stare gaze observe
look glance
walk stroll hike wander
walk go
run jog sprint race
walk move
run move
jump leap hop
jump bounce
sit rest seat relax
lie lay rest recline relax
lie sleep
sleep nap rest
hold carry grab grip
hold have
hold lift
lift raise pick
smile laugh grin
laugh giggle
eat bite chew taste
eat feed
drink sip
eat have
cook prepare bake fry
bake make
cut slice chop
clean wash wipe
brush clean
throw toss pitch
hit kick strike
hit punch
shoot fire
ride drive
ride mount
cycle ride
drive steer
travel ride
pull drag tow
push shove
touch pet stroke
pet stroke
hug embrace cuddle hold
kiss hug
wear put dress
use hold
use operate
work use
build construct make
make create
write draw sign
draw paint sketch
read study look
study learn
teach train
type use
play perform
sing perform
dance perform
show display present
point show
climb scale ascend
stand lean
stand wait
stand pose
pose model
fly soar
swim float
dive jump
surf ride
fall drop
take grab
give offer hand
buy purchase
open unlock
close shut
shout yell scream
cry weep
celebrate cheer
help assist
follow chase
enter go
leave exit
cross walk
cross pass
fish catch
attend visit
happy joyful cheerful glad
sad unhappy
angry mad furious
fearful afraid scared frightened
disgusted contemptuous
surprised astonished amazed
neutral calm
ancient old weathered worn
modern new
fresh new
huge large
tiny small
small short
large tall
huge tall
large wide
damp wet
grimy dirty muddy
dirty dusty
dirty rusty
mossy verdant
clear sunny bright
cloudy foggy murky
murky dirty muddy
dark murky
dark dull
cloudy dull
shiny bright clean
broken cracked shattered chipped
broken splintered
broken dented
broken crushed
torn ripped frayed worn
torn broken
crinkled creased wrinkled crumpled
crumpled crushed
ruffled wrinkled
ruffled crumpled
mashed crushed pureed squished
mashed pureed
bent curved winding coiled
bent folded
curved winding
bent dented
cut sliced diced
cut peeled
chipped cracked
scratched worn
weathered eroded rough
rough splintered
frayed worn
burnt browned caramelized
cooked browned
cooked caramelized
melted molten
toppled fallen
standing upright
full filled
thick wide
thin narrow
thick heavy
brushed smooth
clean new
ripe fresh
unripe fresh
raw fresh
upright straight
lightweight thin
clear clean
gray grey silver
purple violet
orange gold
tan beige brown
pink rose
red maroon
blue navy
zero none 0
one 1 single
two 2 pair couple
three 3
four 4
five 5
six 6
seven 7
eight 8
nine 9
ten 10
"""

SENSES: dict[str, set[int]] = defaultdict(set)
for _number, _line in enumerate(SETS.strip().splitlines()):
    for _word in _line.split():
        SENSES[_word].add(_number)


def near(one: str, other: str) -> bool:
    """Whether two words say nearly the same, upper and lower case aside.

    A plural in -s, an -ing form and the word itself are told apart by the callers' grammar; here
    a word also meets its own plural in -s.

    >>> near("man", "guy"), near("Kids", "child"), near("man", "horse")
    (True, True, False)
    """
    ones, others = _forms(one.casefold()), _forms(other.casefold())
    if ones & others:
        return True
    return any(SENSES.get(a, set()) & SENSES.get(b, set()) for a in ones for b in others)


def _forms(word: str) -> set[str]:
    """The word, and what it may be the plural or the -ing form of."""
    forms = {word}
    if word.endswith("s") and len(word) > 3 and not word.endswith("ss"):
        forms.add(word[:-1])
        if word.endswith("es"):
            forms.add(word[:-2])
    if word.endswith("ing") and len(word) > 4:
        stem = word[:-3]
        forms |= {stem, stem + "e"}
        if stem[-1] == stem[-2]:
            forms.add(stem[:-1])
        if stem.endswith("y"):
            forms.add(stem[:-1] + "ie")
    return forms
