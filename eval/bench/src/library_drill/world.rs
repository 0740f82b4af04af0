//! What a library must hold: names and contents, and the steps that change them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::crash::Random;
use crate::error::Result;
use settings::QuireError;

/// Documents at most; beyond, steps remove some.
const MOST: usize = 24;

/// The documents of the drill: file names and numbers of contents, of which no two are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct World {
    pub(super) documents: BTreeMap<String, u64>,
    /// Those that were removed and can be brought back.
    #[serde(default)]
    pub(super) removed: BTreeMap<String, u64>,
    /// The next content.
    pub(super) next: u64,
}

/// One thing that is done with a library.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Step {
    /// Documents are added or replaced.
    Put(Vec<(String, u64)>),
    /// Documents are removed by their names.
    Remove(Vec<String>),
    /// Files get other names, and are ingested under these.
    Rename(String, String),
    /// Files come, change and go; the folder is synced.
    Sync {
        /// Those that come or change.
        put: Vec<(String, u64)>,
        /// Those that go.
        gone: Vec<String>,
    },
    /// Half of the stored chunks make way.
    Evict,
    /// Documents are removed for good, down to the bytes on disk.
    Purge(Vec<String>),
    /// Everything that was removed or replaced before is gone for good.
    Reclaim,
    /// Documents that were removed come back.
    Undo(Vec<String>),
    /// A file is uploaded whose time has come, and it is removed.
    Expire(u64),
    /// The catalog is written anew.
    Repair,
}

impl Step {
    /// Whether chunks that were acknowledged may be gone after it.
    pub(super) fn frees_chunks(&self) -> bool {
        matches!(self, Step::Evict | Step::Purge(_) | Step::Reclaim)
    }
}

impl World {
    /// A step that can be made from here.
    pub(super) fn step(&mut self, random: &mut Random) -> Step {
        let names: Vec<String> = self.documents.keys().cloned().collect();
        let choice = match names.len() {
            0 => 0,
            1..=MOST => random.below(16),
            _ => 1,
        };
        match choice {
            1 => Step::Remove(some(&names, random)),
            2 | 3 => Step::Sync { put: self.some_new(random), gone: some(&names, random) },
            8 => Step::Rename(random.choose(&names).clone(), format!("renamed-{}.md", self.content())),
            9 => Step::Evict,
            10 => Step::Purge(some(&names, random)),
            11 => Step::Reclaim,
            12 | 13 if !self.removed.is_empty() => {
                Step::Undo(some(&self.removed.keys().cloned().collect::<Vec<_>>(), random))
            }
            14 => Step::Expire(self.content()),
            15 => Step::Repair,
            _ => Step::Put(self.some_new(random)),
        }
    }

    fn content(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Up to three documents, new ones or other contents of ones that may be there.
    fn some_new(&mut self, random: &mut Random) -> Vec<(String, u64)> {
        let mut put = BTreeMap::new();
        for _ in 0..=random.below(3) {
            put.insert(format!("note-{:02}.md", random.below(2 * MOST)), self.content());
        }
        put.into_iter().collect()
    }

    /// What there is once a step is done.
    pub(super) fn after(&self, step: &Step) -> World {
        let mut after = self.clone();
        match step {
            Step::Put(put) => after.documents.extend(put.iter().cloned()),
            Step::Remove(gone) => after.remove(gone),
            Step::Purge(gone) => after.documents.retain(|name, _| !gone.contains(name)),
            Step::Undo(names) => {
                let back: Vec<_> = names.iter().filter_map(|name| after.removed.remove_entry(name)).collect();
                after.documents.extend(back);
            }
            Step::Rename(old, new) => {
                let content = after.documents.remove(old);
                after.documents.extend(content.map(|content| (new.clone(), content)));
            }
            Step::Sync { put, gone } => {
                after.remove(gone);
                after.documents.extend(put.iter().cloned());
            }
            Step::Reclaim => after.removed.clear(),
            Step::Expire(content) => after.next = after.next.max(*content),
            Step::Evict | Step::Repair => {}
        }
        // What has come in under its name would be replaced.
        after.removed.retain(|name, _| !after.documents.contains_key(name));
        let numbers = after.documents.values().copied().max().unwrap_or(0);
        after.next = after.next.max(numbers);
        after
    }

    fn remove(&mut self, gone: &[String]) {
        let gone: Vec<_> = gone.iter().filter_map(|name| self.documents.remove_entry(name)).collect();
        self.removed.extend(gone);
    }

    /// What can certainly be brought back from what was `found` after a step was cut off.
    pub(super) fn surely_removed(&self, after: &World, found: &World) -> BTreeMap<String, u64> {
        let still = |(name, content): &(&String, &u64)| {
            after.removed.get(*name) == Some(*content) && !found.documents.contains_key(*name)
        };
        self.removed.iter().filter(still).map(|(name, content)| (name.clone(), *content)).collect()
    }

    /// The contents of which no byte may be left once a step is done.
    pub(super) fn erased_by(&self, step: &Step) -> BTreeSet<u64> {
        match step {
            Step::Purge(gone) => gone.iter().filter_map(|name| self.documents.get(name)).copied().collect(),
            Step::Reclaim => {
                let held: BTreeSet<u64> = self.documents.values().copied().collect();
                (1..=self.next).filter(|content| !held.contains(content)).collect()
            }
            Step::Expire(content) => BTreeSet::from([*content]),
            _ => BTreeSet::new(),
        }
    }

    /// Makes the files in `dir` those of this world.
    pub(super) fn write_files(&self, dir: &Path) -> Result<()> {
        let writing = |path: PathBuf| move |source| QuireError::Io { action: "write", path, source };
        std::fs::create_dir_all(dir).map_err(writing(dir.into()))?;
        for entry in std::fs::read_dir(dir).map_err(writing(dir.into()))? {
            let entry = entry.map_err(writing(dir.into()))?;
            if !self.documents.contains_key(&*entry.file_name().to_string_lossy()) {
                std::fs::remove_file(entry.path()).map_err(writing(entry.path()))?;
            }
        }
        for (name, content) in &self.documents {
            let path = dir.join(name);
            std::fs::write(&path, text(*content)).map_err(writing(path.clone()))?;
        }
        Ok(())
    }
}

/// One or two of these.
fn some(names: &[String], random: &mut Random) -> Vec<String> {
    let mut chosen: Vec<String> = (0..=random.below(2)).map(|_| random.choose(names).clone()).collect();
    chosen.sort();
    chosen.dedup();
    chosen
}

/// A word that stands in this content and in no other.
pub(super) fn marker(content: u64) -> String {
    format!("zq{content}marker")
}

/// The contents whose words stand in these bytes.
pub(super) fn markers(bytes: &[u8]) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    for (at, pair) in bytes.windows(2).enumerate() {
        if pair != b"zq" {
            continue;
        }
        let rest = &bytes[at + 2..];
        let digits = rest.iter().take(20).take_while(|byte| byte.is_ascii_digit()).count();
        let number: Option<u64> = std::str::from_utf8(&rest[..digits]).ok().and_then(|digits| digits.parse().ok());
        found.extend(number.filter(|_| rest[digits..].starts_with(b"marker")));
    }
    found
}

/// The text of a content: some are one passage, some are several.
pub(super) fn text(content: u64) -> String {
    let mut random = Random(content);
    let mut text = format!("# Note {content}\n\nThe {} was written down.\n\n", marker(content));
    let (things, places) = (["lamp", "barrel", "letter", "chart", "anchor"], ["quay", "mill", "archive", "tower"]);
    for _ in 0..[1, 2, 4, 30][random.below(4)] {
        let number = 1000 + random.below(9000);
        text += &format!("A {} lies at the {} under {number}. ", random.choose(&things), random.choose(&places));
    }
    text.trim_end().to_string() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_lead_from_world_to_world_and_no_content_comes_twice() {
        let (mut world, mut random) = (World::default(), Random(5));
        let mut seen = std::collections::HashSet::new();
        let mut undone = 0;
        for _ in 0..500 {
            let step = world.step(&mut random);
            let after = world.after(&step);
            if let Step::Undo(names) = &step {
                assert!(names.iter().all(|name| after.documents[name] == world.removed[name]), "{step:?}");
                undone += names.len();
            }
            assert!(after.removed.keys().all(|name| !after.documents.contains_key(name)));
            let new: Vec<u64> = match &step {
                Step::Put(put) | Step::Sync { put, .. } => put.iter().map(|(_, content)| *content).collect(),
                _ => Vec::new(),
            };
            assert!(new.iter().all(|content| seen.insert(*content)), "{step:?}");
            assert!(after.documents.len() <= MOST + 6, "{}", after.documents.len());
            world = after;
        }
        assert!(undone > 20, "{undone}");
        assert!(text(1) != text(2) && text(7) == text(7));
        assert_eq!(markers(format!("{}zqmarker zq5mar{}", text(12), marker(7)).as_bytes()), BTreeSet::from([7, 12]));
    }
}
