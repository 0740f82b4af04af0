//! What contexts are to hold: sentences, and the question about them.

use rand::Rng;

use super::Question;
use super::words::Words;

/// Where the sentences of a group go.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// Anywhere, in the given order; two may share a chunk.
    Any,
    /// Each in a chunk of its own, in the given order.
    Spread,
    /// The first ends a chunk, the others begin the next.
    Boundary,
}

/// What a context is to hold.
pub(super) struct Plan {
    pub(super) groups: Vec<(Place, Vec<String>)>,
    pub(super) question: Question,
}

/// What a person is said to have done, the question for it, and the kind of value.
const FACTS: [(&str, &str, char); 8] = [
    ("was paid {v} dollars for the work", "How many dollars was {s} paid for the work?", 'n'),
    ("moved to {v} last spring", "Where did {s} move last spring?", 'c'),
    ("chose the password {v}", "Which password did {s} choose?", 'w'),
    ("grew up in {v}", "Where did {s} grow up?", 'c'),
    ("studied under Professor {v}", "Under which professor did {s} study?", 'c'),
    ("was given office number {v}", "Which office number was {s} given?", 'n'),
    ("keeps the spare key in locker {v}", "In which locker does {s} keep the spare key?", 'n'),
    ("was seen in {v} two days later", "Where was {s} seen two days later?", 'c'),
];
const ALIASES: [&str; 5] = [
    "In this file, {a} means {s}.",
    "{a} is the code name of {s}.",
    "{s} is known to colleagues only as {a}.",
    "The documents refer to {s} as {a}.",
    "Among friends, {s} goes by the name {a}.",
];
/// Two sentences that meet in `{k}`, the question, whether `{s}` is a person, and the kind of value.
const REFERENCES: [(&str, &str, &str, bool, char); 5] = [
    (
        "Project {k} is run by the {s} laboratory.",
        "The laboratory behind Project {k} is based in {v}.",
        "In which city is the {s} laboratory based?",
        false,
        'c',
    ),
    (
        "The ship {k} belongs to the {s} company.",
        "The owner of the ship {k} employs {v} people.",
        "How many people does the {s} company employ?",
        false,
        'n',
    ),
    (
        "The novel \"{k}\" was written by {s}.",
        "The author of \"{k}\" lives in {v}.",
        "In which city does {s} live?",
        true,
        'c',
    ),
    ("{s} is the mayor of {k}.", "The mayor of {k} received {v} votes.", "How many votes did {s} receive?", true, 'n'),
    (
        "The river {k} flows through the town of {s}.",
        "The town on the river {k} has {v} inhabitants.",
        "How many inhabitants does the town of {s} have?",
        false,
        'n',
    ),
];
const SUBJECTS: [&str; 4] = [
    "The person interviewed here is {s}.",
    "The next pages tell the story of {s}.",
    "The following notes are about {s}.",
    "Then the committee turned to the case of {s}.",
];

fn fill(form: &str, pairs: &[(&str, &str)]) -> String {
    pairs.iter().fold(form.to_owned(), |text, (hole, value)| text.replace(hole, value))
}

/// A group of sentences that belong together, and a question about them.
type Group = (Place, Vec<String>, Question);

impl Words {
    /// Facts for a task other than `kv`: `size` groups of them where the number is free.
    pub(super) fn plan(&mut self, task: &str, size: usize) -> Plan {
        match task {
            "niah_single" => self.needles(task, "number", 1, 1),
            "niah_uuid" => self.needles(task, "uuid", size.max(2), 1),
            "niah_multivalue" => self.needles(task, "number", 2, 4),
            "niah_multiquery" => self.several_keys(),
            "vt" => self.chains((size + 1).clamp(2, 10)),
            "x_alias" => self.people(size, Words::alias),
            "x_ref" => self.people(size, Words::reference),
            "x_pron" => self.people(size, Words::pronoun),
            _ => self.people(size, Words::report),
        }
    }

    fn value(&mut self, kind: char) -> String {
        match kind {
            'n' => self.number(3..=5),
            'w' => self.word(),
            _ => self.name(),
        }
    }

    /// `keys` keys with 2 to `most` values each (one if `most` is 1); the first one is asked for.
    fn needles(&mut self, task: &str, noun: &str, keys: usize, most: usize) -> Plan {
        let mut groups = Vec::new();
        let mut question = None;
        for _ in 0..keys {
            let key = self.key();
            let many = if most > 1 { self.rng.random_range(2..=most) } else { 1 };
            let values: Vec<String> =
                (0..many).map(|_| if noun == "uuid" { self.uuid() } else { self.number(4..=7) }).collect();
            groups.push((Place::Any, values.iter().map(|value| needle(noun, &key, value)).collect()));
            question.get_or_insert_with(|| Question {
                task: task.into(),
                text: if many > 1 {
                    format!("What are all the special magic {noun}s for {key} mentioned in the provided text?")
                } else {
                    format!("What is the special magic {noun} for {key} mentioned in the provided text?")
                },
                answers: vec![values.join(", ")],
                index: 0,
            });
        }
        Plan { groups, question: question.unwrap_or_else(|| unasked(task)) }
    }

    fn several_keys(&mut self) -> Plan {
        let wanted = self.rng.random_range(2..=4);
        let pairs: Vec<(String, String)> = (0..wanted + 2).map(|_| (self.key(), self.number(4..=7))).collect();
        let keys: Vec<&str> = pairs[..wanted].iter().map(|(key, _)| key.as_str()).collect();
        let values: Vec<&str> = pairs[..wanted].iter().map(|(_, value)| value.as_str()).collect();
        let listed = format!("{}, and {}", keys[..wanted - 1].join(", "), keys[wanted - 1]);
        let question = Question {
            task: "niah_multiquery".into(),
            text: format!("What are all the special magic numbers for {listed} mentioned in the provided text?"),
            answers: vec![values.join(", ")],
            index: 0,
        };
        let groups = pairs.iter().map(|(key, value)| (Place::Any, vec![needle("number", key, value)])).collect();
        Plan { groups, question }
    }

    /// Chains of 1 to 4 assignments of variables to each other; the first chain is asked for.
    fn chains(&mut self, chains: usize) -> Plan {
        let mut groups = Vec::new();
        let mut question = None;
        for _ in 0..chains {
            let value = self.number(5..=5);
            let hops = self.rng.random_range(1..=4);
            let names: Vec<String> = (0..=hops).map(|_| self.variable()).collect();
            let mut sentences = vec![format!("VAR {} = {value}.", names[0])];
            sentences.extend(names.windows(2).map(|pair| format!("VAR {} = VAR {}.", pair[1], pair[0])));
            groups.push((Place::Any, sentences));
            question.get_or_insert_with(|| Question {
                task: "vt".into(),
                text: format!("Find all variables that are assigned the value {value} in the text."),
                answers: vec![names.join(", ")],
                index: 0,
            });
        }
        Plan { groups, question: question.unwrap_or_else(|| unasked("vt")) }
    }

    /// `size` groups of one kind; one drawn at random is asked for.
    fn people(&mut self, size: usize, kind: fn(&mut Self) -> Group) -> Plan {
        let asked = self.rng.random_range(0..size);
        let mut question = None;
        let mut groups = Vec::new();
        for number in 0..size {
            let (place, sentences, about) = kind(self);
            groups.push((place, sentences));
            if number == asked {
                question = Some(about);
            }
        }
        Plan { groups, question: question.unwrap_or_else(|| unasked("x_ref")) }
    }

    /// What `subject` did, and the question about `person`.
    fn fact(&mut self, task: &str, subject: &str, person: &str) -> (String, Question) {
        let (says, asks, kind) = self.pick(&FACTS);
        let value = self.value(kind);
        let said = format!("{subject} {}.", fill(says, &[("{v}", &value)]));
        (said, Question { task: task.into(), text: fill(asks, &[("{s}", person)]), answers: vec![value], index: 0 })
    }

    fn alias(&mut self) -> Group {
        let person = self.person().name;
        let title = self.pick(&["", "Source ", "Subject ", "Agent "]);
        let alias = format!("{title}{}", self.name());
        let first = fill(self.pick(&ALIASES), &[("{a}", &alias), ("{s}", &person)]);
        let (second, question) = self.fact("x_alias", &alias, &person);
        (Place::Spread, vec![first, second], question)
    }

    fn reference(&mut self) -> Group {
        let (first, second, asks, is_person, kind) = self.pick(&REFERENCES);
        let owner = if is_person { self.person().name } else { self.name() };
        let (key, value) = (self.name(), self.value(kind));
        let pairs = [("{k}", key.as_str()), ("{s}", owner.as_str()), ("{v}", value.as_str())];
        let question =
            Question { task: "x_ref".into(), text: fill(asks, &pairs), answers: vec![value.clone()], index: 0 };
        (Place::Spread, vec![fill(first, &pairs), fill(second, &pairs)], question)
    }

    fn report(&mut self) -> Group {
        let person = self.person().name;
        let id = self.number(4..=4);
        let first = format!("Report {id}, part one: the subject of this report is {person}.");
        let (said, question) = self.fact("x_report", "the subject", &person);
        (Place::Spread, vec![first, format!("Report {id}, part two: {said}")], question)
    }

    fn pronoun(&mut self) -> Group {
        let person = self.person();
        let first = fill(self.pick(&SUBJECTS), &[("{s}", &person.name)]);
        let subject = if person.pronoun == "she" { "She" } else { "He" };
        let (said, question) = self.fact("x_pron", subject, &person.name);
        (Place::Boundary, vec![first, said], question)
    }
}

fn needle(noun: &str, key: &str, value: &str) -> String {
    format!("One of the special magic {noun}s for {key} is: {value}.")
}

/// Stands where no group was made; every caller makes at least one.
fn unasked(task: &str) -> Question {
    Question { task: task.into(), text: String::new(), answers: vec![String::new()], index: 0 }
}
