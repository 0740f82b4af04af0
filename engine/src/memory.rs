//! How much memory this process may use: the machine's, or less where a control group limits it (as containers and service
//! managers do).
//!
//! `/proc/self/cgroup` says which groups the process is in, `/proc/self/mountinfo` where they are mounted. A limit of any
//! ancestor holds too, so all of them are looked at, in the one hierarchy of version 2 and in that of the memory controller
//! of version 1. What cannot be read limits nothing.

use std::path::{Path, PathBuf};

/// Bytes of memory that this process may use: the machine's, or less where a control group limits it. `None` where the system
/// does not say.
#[must_use]
pub fn limit() -> Option<u64> {
    limit_below(Path::new("/"))
}

/// Of what weights leave, the share that is for KV: the rest is for activations, indexes under construction, the stores'
/// caches and other programs.
pub(crate) fn for_kv(limit: u64, weights: u64) -> u64 {
    limit.saturating_sub(weights) / 4 * 3
}

/// Of what weights leave, the share that is for chunks that requests have used, on a machine without a GPU: part of what
/// [`for_kv`] leaves.
pub(crate) fn for_chunks(limit: u64, weights: u64) -> u64 {
    limit.saturating_sub(weights) / 16
}

fn limit_below(root: &Path) -> Option<u64> {
    machine(root).into_iter().chain(groups(root)).min()
}

fn machine(root: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The limits of all groups that the process is in.
fn groups(root: &Path) -> Vec<u64> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_default();
    let (memberships, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let mut limits = Vec::new();
    for line in memberships.lines() {
        // hierarchy:controllers:path
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let (file, is_mount): (_, &dyn Fn(&Mount<'_>) -> bool) = if controllers.is_empty() {
            ("memory.max", &|mount| mount.kind == "cgroup2")
        } else if controllers.split(',').any(|name| name == "memory") {
            ("memory.limit_in_bytes", &|mount| {
                mount.kind == "cgroup" && mount.options.split(',').any(|option| option == "memory")
            })
        } else {
            continue;
        };
        for mount in mounts.lines().filter_map(Mount::parse).filter(|mount| is_mount(mount)) {
            let top = root.join(mount.at.trim_start_matches('/'));
            // Where only a part of the hierarchy is mounted, paths may begin above it.
            let within = Path::new(path).strip_prefix(&mount.part).unwrap_or(Path::new(""));
            let group = top.join(within.strip_prefix("/").unwrap_or(within));
            let own = group.ancestors().take_while(|folder| folder.starts_with(&top));
            // "max", the word for none, is no number.
            limits.extend(own.filter_map(|at| std::fs::read_to_string(at.join(file)).ok()?.trim().parse::<u64>().ok()));
        }
    }
    limits
}

/// A line of mountinfo.
struct Mount<'a> {
    kind: &'a str,
    options: &'a str,
    /// The part of the file system that is mounted.
    part: PathBuf,
    at: String,
}

impl Mount<'_> {
    /// `36 35 98:0 PART AT OPTIONS [FIELDS...] - KIND SOURCE OPTIONS`
    fn parse(line: &str) -> Option<Mount<'_>> {
        let (mount, system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (part, at) = (PathBuf::from(unescaped(mount.next()?)), unescaped(mount.next()?));
        let mut system = system.split(' ');
        let (kind, _, options) = (system.next()?, system.next()?, system.next()?);
        Some(Mount { kind, options, part, at })
    }
}

/// White space and backslashes stand in mountinfo as `\` and three octal digits.
fn unescaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(code.map_or('\\', char::from));
        rest = &rest[at + if code.is_some() { 4 } else { 1 }..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file system with these files.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const MACHINE: (&str, &str) = ("proc/meminfo", "MemFree: 5 kB\nMemTotal:       16000 kB\n");
    const V2: (&str, &str) = (
        "proc/self/mountinfo",
        "24 1 0:22 / /proc rw - proc proc rw\n31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    );

    fn limit_of(files: &[(&str, &str)]) -> Option<u64> {
        limit_below(system(files).path())
    }

    #[test]
    fn without_groups_it_is_the_machines_memory() {
        assert_eq!(limit_of(&[MACHINE]), Some(16_384_000));
        assert_eq!(limit_of(&[]), None);
        let none = ("proc/self/cgroup", "0::/user.slice\n");
        assert_eq!(limit_of(&[MACHINE, V2, none, ("sys/fs/cgroup/user.slice/memory.max", "max\n")]), Some(16_384_000));
    }

    #[test]
    fn the_smallest_limit_of_a_group_and_its_ancestors_holds() {
        let group = ("proc/self/cgroup", "0::/system.slice/quire.service\n");
        let own = ("sys/fs/cgroup/system.slice/quire.service/memory.max", "9000000\n");
        let parent = ("sys/fs/cgroup/system.slice/memory.max", "8000000\n");
        assert_eq!(limit_of(&[MACHINE, V2, group, own]), Some(9_000_000));
        assert_eq!(limit_of(&[MACHINE, V2, group, own, parent]), Some(8_000_000));
        let sibling = ("sys/fs/cgroup/system.slice/other.service/memory.max", "5\n");
        assert_eq!(limit_of(&[MACHINE, V2, group, own, sibling]), Some(9_000_000));
        // A container with a namespace of its own stands at the top of what it sees.
        let top = [("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/memory.max", "7000000\n")];
        assert_eq!(limit_of(&[MACHINE, V2, top[0], top[1]]), Some(7_000_000));
        // No limit of a group is above the machine's.
        assert_eq!(limit_of(&[MACHINE, V2, group, (own.0, "99000000000\n")]), Some(16_384_000));
    }

    #[test]
    fn groups_of_version_1_limit_too_however_they_are_mounted() {
        let group = ("proc/self/cgroup", "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n");
        let mount = |part: &str| {
            format!(
                "33 24 0:29 {part} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n34 24 0:30 / /cpu ro - cgroup cgroup rw,cpu\n"
            )
        };
        let (whole, part) = (mount("/"), mount("/docker/ab"));
        let none = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        let own = ("sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes", "6000000\n");
        assert_eq!(limit_of(&[MACHINE, ("proc/self/mountinfo", &whole), group, none, own]), Some(6_000_000));
        let top = (none.0, "5000000\n");
        assert_eq!(limit_of(&[MACHINE, ("proc/self/mountinfo", &part), group, top]), Some(5_000_000));
        // The path is of another namespace: what is mounted is the best that is known.
        let elsewhere = mount("/../../elsewhere");
        assert_eq!(limit_of(&[MACHINE, ("proc/self/mountinfo", &elsewhere), group, top]), Some(5_000_000));
    }

    #[test]
    fn names_with_spaces_are_found() {
        assert_eq!(
            (unescaped(r"/a\040b\134c"), unescaped(r"/x\9"), unescaped("")),
            ("/a b\\c".into(), r"/x\9".into(), String::new())
        );
        let mount = ("proc/self/mountinfo", "31 24 0:27 / /my\\040groups rw - cgroup2 cgroup2 rw\n");
        let group = ("proc/self/cgroup", "0::/a b\n");
        assert_eq!(limit_of(&[MACHINE, mount, group, ("my groups/a b/memory.max", "12\n")]), Some(12));
    }

    #[test]
    fn this_machine_says_how_much_it_has() {
        assert!(limit().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn kv_gets_most_of_what_weights_leave() {
        assert_eq!((for_kv(16 << 30, 4 << 30), for_kv(4 << 30, 16 << 30)), (9 << 30, 0));
    }
}
