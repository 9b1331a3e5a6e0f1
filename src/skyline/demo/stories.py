"""The stories: each template draws its numbers, works the problem out on a draft, and returns the question."""

from collections.abc import Callable

from skyline.demo.draft import PLACES, VEHICLES, Draft

Template = Callable[[Draft], str]
TEMPLATES: dict[str, Template] = {}


def template(function: Template) -> Template:
    """Register a function that draws one problem, works it out on the draft and returns the question."""
    TEMPLATES[function.__name__] = function
    return function


# ------------------------------------------------------------------------------------------------ one and two steps


@template
def get_more(d: Draft) -> str:
    who, what, a, b = d.name(), d.item(), d.n(5, 499), d.n(5, 499)
    d.add(a, b)
    return d.pick(
        f"{who} has {a} {what} and gets {b} more. How many {what} does {who} have now?",
        f"{who} had {a} {what}. A friend gave {who} {b} more. How many {what} are there in all?",
    )


@template
def give_away(d: Draft) -> str:
    who, what, b, rest = d.name(), d.item(), d.n(3, 450), d.n(0, 450)
    a = b + rest
    d.sub(a, b)
    return d.pick(
        f"{who} has {a} {what} and gives away {b}. How many {what} are left?",
        f"There were {a} {what} on the table. {who} took {b} of them. How many {what} remain?",
    )


@template
def equal_groups(d: Draft) -> str:
    (one, many), what, a, b = d.container(), d.item(), d.n(2, 9), d.n(2, 99)
    d.mul(a, b)
    return d.pick(
        f"There are {a} {many} with {b} {what} in each {one}. How many {what} are there altogether?",
        f"Each {one} holds {b} {what}. How many {what} are in {a} {many}?",
    )


@template
def share_equally(d: Draft) -> str:
    who, what, k, each = d.name(), d.item(), d.n(2, 9), d.n(2, 99)
    d.div(k * each, k)
    return d.pick(
        f"{who} shares {k * each} {what} equally among {k} friends. How many {what} does each friend get?",
        f"{k * each} {what} are divided equally into {k} groups. How many {what} are in each group?",
    )


@template
def rows_of_seats(d: Draft) -> str:
    rows, seats, taken = d.n(2, 9), d.n(5, 60), d.n(1, 9)
    total = d.mul(rows, seats)
    d.sub(total, taken)
    return (
        f"A {d.pick('hall', 'theater', 'cinema', 'classroom')} has {rows} rows with {seats} seats each. "
        f"{taken} seats are {d.pick('taken', 'broken', 'occupied')}. How many seats are {d.pick('free', 'left')}?"
    )


@template
def change_from_banknote(d: Draft) -> str:
    who, what, k, price = d.name(), d.item(), d.n(2, 9), d.n(1, 11)
    note = 20 if k * price <= 20 else 50 if k * price <= 50 else 100
    cost = d.mul(k, price)
    d.sub(note, cost)
    return d.pick(
        f"{who} buys {k} {what} for ${price} each and pays with a ${note} bill. How much change does {who} get?",
        f"At the {d.pick(*PLACES)}, {what} cost ${price} each. {who} buys {k} and pays with ${note}. "
        f"How many dollars does {who} get back?",
    )


@template
def two_purchases(d: Draft) -> str:
    who, (x, y) = d.name(), d.items(2)
    a, p, b, q = d.n(2, 9), d.n(2, 20), d.n(2, 9), d.n(2, 20)
    d.add(d.mul(a, p), d.mul(b, q))
    return d.pick(
        f"{who} buys {a} {x} at ${p} each and {b} {y} at ${q} each. How much does {who} pay in total?",
        f"At the {d.pick(*PLACES)}, {who} buys {a} {x} for ${p} each and {b} {y} for ${q} each. "
        f"How many dollars does {who} spend?",
    )


@template
def drive_distance(d: Draft) -> str:
    speed, hours = d.n(11, 99), d.n(2, 9)
    d.mul(hours, speed)
    return d.pick(
        f"A {d.pick(*VEHICLES)} travels at {speed} km per hour for {hours} hours. How many kilometers does it travel?",
        f"How far does a {d.pick(*VEHICLES)} go in {hours} hours at {speed} km per hour?",
    )


@template
def drive_two_legs(d: Draft) -> str:
    s, t, u, v = d.n(10, 60), d.n(2, 6), d.n(10, 60), d.n(2, 6)
    d.add(d.mul(t, s), d.mul(v, u))
    return (
        f"A {d.pick(*VEHICLES)} travels {t} hours at {s} km per hour and then {v} hours at {u} km per hour. "
        f"{d.pick('How many kilometers is that in total?', 'What is the total distance in kilometers?')}"
    )


@template
def distance_left(d: Draft) -> str:
    who, speed, hours, left = d.name(), d.n(5, 60), d.n(2, 9), d.n(5, 400)
    total = speed * hours + left
    done = d.mul(hours, speed)
    d.sub(total, done)
    return (
        f"{who} has to travel {total} km and goes {speed} km per hour. "
        f"How many kilometers {d.pick('are left', 'remain')} after {hours} hours?"
    )


@template
def daily_detour(d: Draft) -> str:
    daily, days, detour = d.n(5, 90), d.n(2, 9), d.n(1, 9)
    d.add(d.div(daily * days, days), detour)
    return (
        f"A {d.pick(*VEHICLES)} goes {daily * days} km in {days} days, the same distance every day. "
        f"From now on a detour adds {detour} km to each day. How many kilometers does it go each day?"
    )


@template
def older(d: Draft) -> str:
    (a, b), age, gap, years = d.names(2), d.n(3, 60), d.n(1, 30), d.n(2, 30)
    d.add(d.add(age, gap), years)
    return d.pick(
        f"{a} is {age} years old. {b} is {gap} years older than {a}. How old will {b} be in {years} years?",
        f"{b} is {gap} years older than {a}, who is {age}. How old will {b} be {years} years from now?",
    )


@template
def times_as_old(d: Draft) -> str:
    (a, b), age, k = d.names(2), d.n(3, 20), d.n(2, 5)
    d.add(d.mul(k, age), age)
    return (
        f"{a} is {age} years old and {b} is {k} times as old. "
        f"{d.pick('What is the sum of their ages?', 'How old are they together?')}"
    )


@template
def younger(d: Draft) -> str:
    (a, b), gap, rest = d.names(2), d.n(2, 30), d.n(1, 40)
    age = gap + rest
    d.add(age, d.sub(age, gap))
    return f"{a} is {age} years old. {b} is {gap} years younger. What is the sum of their ages?"


@template
def savings_weekly(d: Draft) -> str:
    who, start, week, k = d.name(), d.n(5, 300), d.n(3, 60), d.n(2, 9)
    d.add(start, d.mul(k, week))
    return d.pick(
        f"{who} has ${start} and saves ${week} every week. How much money does {who} have after {k} weeks?",
        f"{who} saves ${week} a week for {k} weeks and already had ${start}. "
        f"How many dollars does {who} have in the end?",
    )


@template
def savings_goal(d: Draft) -> str:
    who, k, week, have = d.name(), d.n(2, 9), d.n(2, 50), d.n(5, 300)
    goal = have + k * week
    d.div(d.sub(goal, have), k)
    return (
        f"{who} wants to buy a {d.pick('bike', 'guitar', 'phone', 'camera', 'tent')} for ${goal} "
        f"and already has ${have}. "
        f"How much must {who} save each week to buy it in {k} weeks?"
    )


@template
def earn_and_spend(d: Draft) -> str:
    who, wage, hours, left = d.name(), d.n(8, 30), d.n(2, 9), d.n(1, 7)
    earned = d.mul(hours, wage)
    spent = hours * (wage - left)
    d.sub(earned, spent)
    return (
        f"{who} earns ${wage} an hour and works {hours} hours. Then {who} spends ${spent} on {d.item()}. "
        f"How {d.pick('much money is', 'many dollars are')} left?"
    )


@template
def work_week(d: Draft) -> str:
    who, hours, days, wage = d.name(), d.n(2, 9), d.n(2, 6), d.n(2, 9)
    d.mul(wage, d.mul(days, hours))
    return (
        f"{who} works {hours} hours a day for {days} days and earns ${wage} an hour. How many dollars does {who} earn?"
    )


@template
def minutes_daily(d: Draft) -> str:
    who, minutes, days, extra = d.name(), d.n(5, 60), d.n(2, 7), d.n(5, 90)
    what = d.pick("reads", "runs", "swims", "practices the piano", "walks", "draws")
    d.add(d.mul(days, minutes), extra)
    return (
        f"{who} {what} {minutes} minutes a day for {days} days and {extra} minutes on the day after. "
        f"How many minutes is that?"
    )


@template
def hours_to_minutes(d: Draft) -> str:
    what, hours, extra = d.pick("film", "concert", "lesson", "flight", "game", "meeting"), d.n(2, 9), d.n(1, 59)
    d.add(d.mul(hours, 60), extra)
    return f"A {what} lasts {hours} hours and {extra} minutes. How many minutes is that?"


@template
def pages_left(d: Draft) -> str:
    who, per, days, left = d.name(), d.n(5, 60), d.n(2, 9), d.n(2, 300)
    total = per * days + left
    d.sub(total, d.mul(days, per))
    return d.pick(
        f"A book has {total} pages. {who} reads {per} pages a day for {days} days. How many pages are left?",
        f"{who} reads {per} pages each day of a book with {total} pages. How many pages remain after {days} days?",
    )


@template
def days_to_read(d: Draft) -> str:
    who, per, days, done = d.name(), d.n(2, 9), d.n(2, 60), d.n(3, 200)
    total = per * days + done
    d.div(d.sub(total, done), per)
    return (
        f"{who} has already read {done} of the {total} pages of a book and now reads {per} pages a day. "
        f"How many days does {who} need to finish it?"
    )


@template
def packs_and_loose(d: Draft) -> str:
    who, what, (one, many) = d.name(), d.item(), d.container()
    k, per, loose = d.n(2, 9), d.n(3, 60), d.n(1, 99)
    d.add(d.mul(k, per), loose)
    return d.pick(
        f"{who} has {k} {many} of {what} with {per} {what} in each {one}, and {loose} more {what}. "
        f"How many {what} is that?",
        f"{k} {many} hold {per} {what} each, and {loose} {what} lie beside them. How many {what} are there in total?",
    )


@template
def bake_and_pack(d: Draft) -> str:
    who, what = d.name(), d.pick("cookies", "muffins", "rolls", "buns")
    per, full, eaten = d.n(2, 9), d.n(2, 60), d.n(1, 30)
    d.div(d.sub(per * full + eaten, eaten), per)
    return (
        f"{who} bakes {per * full + eaten} {what}. The family eats {eaten}. The rest are packed into bags of {per}. "
        f"How many bags are {d.pick('there', 'filled')}?"
    )


# -------------------------------------------------------------------------------------------- two, three, four steps


@template
def merge_and_share(d: Draft) -> str:
    (x, y), what, k, each, a = d.names(2), d.item(), d.n(2, 9), d.n(5, 90), d.n(2, 9)
    first = each * k - a
    d.div(d.add(first, a), k)
    return (
        f"{x} has {first} {what} and {y} has {a} {what}. "
        f"They put them together and share them equally among {k} children. "
        f"How many {what} does each child get?"
    )


@template
def three_friends(d: Draft) -> str:
    (x, y, z), what = d.names(3), d.item()
    a, more, k = d.n(2, 60), d.n(2, 40), d.n(2, 4)
    b = d.add(a, more)
    c = d.mul(k, a)
    d.add(d.add(a, b), c)
    times = {2: "twice", 3: "three times", 4: "four times"}[k]
    return (
        f"{x} has {a} {what}. {y} has {more} more {what} than {x}. {z} has {times} as many {what} as {x}. "
        f"How many {what} do they have together?"
    )


@template
def fewer_than(d: Draft) -> str:
    (x, y), what, less, rest = d.names(2), d.item(), d.n(2, 200), d.n(1, 200)
    a = less + rest
    d.add(a, d.sub(a, less))
    return (
        f"{x} {d.pick('has', 'collects', 'finds')} {a} {what}. {y} {d.pick('has', 'gets')} {less} fewer. "
        f"How many {what} do they have together?"
    )


@template
def bus_stops(d: Draft) -> str:
    off, stay, on, off2 = d.n(1, 30), d.n(5, 40), d.n(5, 40), d.n(1, 5)
    people = off + stay
    d.sub(d.add(d.sub(people, off), on), off2)
    return (
        f"There are {people} people on a {d.pick('bus', 'train', 'tram', 'boat')}. At the first stop {off} get off and "
        f"{on} get on. At the next stop {off2} get off. How many people are on it now?"
    )


@template
def class_teams(d: Draft) -> str:
    girls, size, teams = d.n(2, 9), d.n(2, 9), d.n(6, 30)
    boys = size * teams - girls
    d.div(d.add(girls, boys), size)
    return f"{girls} girls and {boys} boys form teams of {size}. How many teams are there?"


@template
def garden_rows(d: Draft) -> str:
    what = d.pick("tulips", "roses", "trees", "carrots", "bean plants", "cabbages")
    a, p, b, q, dead = d.n(2, 9), d.n(3, 40), d.n(2, 9), d.n(3, 40), d.n(1, 9)
    total = d.add(d.mul(a, p), d.mul(b, q))
    d.sub(total, dead)
    return (
        f"A garden has {a} rows of {p} {what} and {b} rows of {q} {what}. {dead} of them "
        f"{d.pick('die', 'are picked', 'are sold')}. How many {what} are left?"
    )


@template
def perimeter(d: Draft) -> str:
    a, b = d.n(2, 60), d.n(2, 39)
    d.mul(2, d.add(a, b))
    return (
        f"A {d.pick('field', 'garden', 'room', 'pool', 'rectangle')} is {a} meters long and {b} meters wide. "
        f"What is its perimeter in meters?"
    )


@template
def area(d: Draft) -> str:
    a, b = d.n(2, 9), d.n(2, 99)
    d.mul(a, b)
    return (
        f"A {d.pick('field', 'garden', 'room', 'wall', 'rectangle')} is {b} meters long and {a} meters wide. "
        f"What is its area in square meters?"
    )


@template
def ticket_sales(d: Draft) -> str:
    adults, price, children, less = d.n(2, 9), d.n(6, 25), d.n(2, 9), d.n(1, 5)
    child_price = d.sub(price, less)
    d.add(d.mul(adults, price), d.mul(children, child_price))
    return (
        f"An adult ticket costs ${price} and a child ticket costs ${less} less. "
        f"How many dollars do {adults} adults and {children} children pay together?"
    )


@template
def discount(d: Draft) -> str:
    who, what, k, price, off = d.name(), d.item(), d.n(2, 9), d.n(10, 60), d.n(1, 9)
    d.mul(k, d.sub(price, off))
    return (
        f"{what.capitalize()} usually cost ${price} each, but today they are ${off} cheaper. "
        f"How much does {who} pay for {k} of them?"
    )


@template
def shared_cost(d: Draft) -> str:
    k, each, tip = d.n(2, 9), d.n(5, 60), d.n(1, 9)
    bill = k * each - tip
    d.div(d.add(bill, tip), k)
    return (
        f"{k} friends share a {d.pick('meal', 'taxi', 'dinner', 'boat trip')} that costs ${bill} "
        f"and add a tip of ${tip}. "
        f"Each pays the same. How many dollars does each pay?"
    )


@template
def stock_of_shop(d: Draft) -> str:
    what, (one, many) = d.item(), d.container()
    have, k, per, sold = d.n(10, 200), d.n(2, 9), d.n(5, 50), d.n(2, 9)
    total = d.add(have, d.mul(k, per))
    d.sub(total, sold)
    return (
        f"A {d.pick(*PLACES)} has {have} {what}. It receives {k} {many} with {per} {what} in each {one} "
        f"and then sells {sold} {what}. "
        f"How many {what} does it have now?"
    )


@template
def farm_legs(d: Draft) -> str:
    four, two = d.n(2, 40), d.n(2, 40)
    d.add(d.mul(4, four), d.mul(2, two))
    return (
        f"A farm has {four} {d.pick('cows', 'sheep', 'goats', 'horses')} "
        f"and {two} {d.pick('chickens', 'ducks', 'geese')}. "
        f"How many legs do the animals have in total?"
    )


@template
def machine_output(d: Draft) -> str:
    what, per, hours, bad, k = d.item(), d.n(5, 19), d.n(2, 5), d.n(2, 9), d.n(2, 5)
    d.mul(k, d.sub(d.mul(hours, per), bad))
    return (
        f"A machine makes {per} {what} an hour and runs {hours} hours a day. {bad} of them are thrown away every day. "
        f"How many good {what} are made in {k} days?"
    )


@template
def half_of(d: Draft) -> str:
    who, what, half, extra = d.name(), d.item(), d.n(2, 200), d.n(1, 99)
    left = d.div(2 * half, 2)
    d.add(left, extra)
    return (
        f"{who} has {2 * half} {what}, gives half of them to a friend and then finds {extra} more. "
        f"How many {what} does {who} have now?"
    )


@template
def boxes_needed(d: Draft) -> str:
    what, (one, many), per, k, boxes = d.item(), d.container(), d.n(2, 9), d.n(2, 6), d.n(2, 15)
    d.div(d.mul(k, per * boxes), per)
    return (
        f"{k} children each bring {per * boxes} {what}. A {one} holds {per} {what}. "
        f"How many {many} are needed for all the {what}?"
    )


@template
def temperature(d: Draft) -> str:
    start, rise, fall = d.n(5, 25), d.n(1, 15), d.n(1, 6)
    d.sub(d.add(start, rise), fall)
    return (
        f"In the morning it is {start} degrees. By noon it is {rise} degrees warmer, "
        f"and in the evening it is {fall} degrees colder than at noon. How many degrees is it in the evening?"
    )
