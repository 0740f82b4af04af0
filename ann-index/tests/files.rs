//! Files: the first version stays readable, and no damage leads to a wrong answer or a panic.

#![allow(clippy::unwrap_used)]

mod common;

use ann_index::{IndexError, IndexKind, IndexParams, build, open};
use common::{DIM, answers, indexes, mend, mutate};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

#[test]
fn damage_is_an_error_or_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index");
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for index in indexes(600) {
        index.save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let expected = answers(&*index);
        for _ in 0..60 {
            let mut bytes = whole.clone();
            mutate(&mut bytes, &mut rng);
            std::fs::write(&path, &bytes).unwrap();
            match open(&path) {
                Ok(opened) => {
                    assert!(bytes == whole, "{index:?}: a changed file was opened");
                    if index.kind() != IndexKind::Hnsw {
                        assert_eq!(answers(&*opened), expected);
                    }
                }
                Err(error) => assert!(matches!(error, IndexError::Damaged { .. }), "{error}"),
            }
        }
    }
}

#[test]
fn saves_to_one_path_at_once_leave_a_whole_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index");
    let of = |keys: usize| build(16, &vec![0.5; 16 * keys], &[], &IndexParams::default()).unwrap();
    let indexes = [of(4000), of(3001)];
    for _ in 0..40 {
        std::thread::scope(|scope| {
            let saves: Vec<_> = indexes.iter().map(|index| scope.spawn(|| index.save(&path))).collect();
            saves.into_iter().for_each(|save| save.join().unwrap().unwrap());
        });
        assert!([4000, 3001].contains(&open(&path).unwrap().len()));
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
}

#[cfg(unix)]
#[test]
fn a_link_to_a_file_stays_one() {
    let folder = tempfile::tempdir().unwrap();
    let (file, link) = (folder.path().join("index"), folder.path().join("link"));
    let all = indexes(20);
    all[0].save(&file).unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    all[1].save(&link).unwrap();
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(format!("{:?}", open(&file).unwrap()), format!("{:?}", open(&link).unwrap()));
    // Also where nothing is yet.
    let (early, later) = (folder.path().join("early"), folder.path().join("later"));
    std::os::unix::fs::symlink("later", &early).unwrap();
    all[1].save(&early).unwrap();
    assert!(std::fs::symlink_metadata(&early).unwrap().is_symlink());
    assert_eq!(std::fs::read(&later).unwrap(), std::fs::read(&file).unwrap());
    // Links that lead to each other, and what is no file, are left as they are.
    let (a, b, socket) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("socket"));
    std::os::unix::fs::symlink(&b, &a).unwrap();
    std::os::unix::fs::symlink(&a, &b).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for path in [&a, &socket] {
        let error = all[1].save(path).unwrap_err();
        assert!(matches!(error, IndexError::Io { action: "writing", .. }), "{error}");
        assert!(!std::fs::symlink_metadata(path).unwrap().is_file());
    }
    // A file that is replaced keeps its permissions.
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    all[1].save(&file).unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
    let mut key = [0.0; DIM];
    all[1].key(3, &mut key).unwrap();
    let mut found = [0.0; DIM];
    open(&file).unwrap().key(3, &mut found).unwrap();
    assert_eq!(key, found, "the later index");
}

#[test]
fn nonsense_with_right_checksums_is_survived() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index");
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    for index in indexes(600).into_iter().filter(|index| index.kind() != IndexKind::Hnsw) {
        index.save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for _ in 0..60 {
            let mut bytes = whole.clone();
            mutate(&mut bytes, &mut rng);
            mend(&mut bytes);
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(opened) = open(&path)
                && opened.dim() < 100
            {
                for found in answers(&*opened) {
                    assert_eq!(found.hits.len(), opened.len().min(10));
                }
                opened.append(&vec![1.0; 3 * opened.dim()]).unwrap();
                answers(&*opened);
            }
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index");
    assert!(matches!(open(&path).unwrap_err(), IndexError::Io { action: "reading", .. }));
    indexes(20)[0].save(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let says = |at: usize, byte: u8, word: &str| {
        let mut bytes = whole.clone();
        bytes[at] = byte;
        std::fs::write(&path, &bytes).unwrap();
        let error = open(&path).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("index"), "{error}");
    };
    says(0, b'q', "does not begin");
    says(8, 2, "version 2, expected 1");
    says(30, 1, "header checksum");
    says(whole.len() - 1, whole[whole.len() - 1] ^ 1, "checksum");
    let mut foreign = whole.clone();
    foreign[12..16].reverse();
    std::fs::write(&path, &foreign).unwrap();
    assert!(open(&path).unwrap_err().to_string().contains("order the bytes"));
    for index in indexes(20) {
        index.save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for len in (0..whole.len().min(1500)).chain([whole.len() - 1]) {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(open(&path).is_err(), "{index:?} cut to {len} bytes");
        }
    }
}

#[test]
fn a_kind_that_is_not_built_in_is_refused_with_the_way_to_get_it() {
    if IndexKind::Ivf.is_built_in() {
        return;
    }
    let params = IndexParams { kind: IndexKind::Ivf, ..IndexParams::default() };
    let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/v1-ivf-17.ann");
    for error in [open(&fixture).unwrap_err(), build(2, &[1.0, 2.0], &[], &params).unwrap_err()] {
        assert!(matches!(error, IndexError::Unsupported { kind: IndexKind::Ivf, .. }), "{error}");
        assert!(error.to_string().contains("--features faiss"), "{error}");
    }
}

/// Files that the first program with this format wrote. To write them for a new version:
/// `QUIRE_WRITE=1 cargo test -p ann-index --test files`, then add the new folder here.
#[test]
fn files_of_version_1_are_read() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    for (i, index) in indexes(600).iter().enumerate().filter(|(i, _)| i % 4 == 1) {
        let path = folder.join(format!("v1-{}-{i}.ann", index.kind()));
        if std::env::var_os("QUIRE_WRITE").is_some() {
            index.save(&path).unwrap();
        }
        let opened = open(&path).unwrap();
        assert_eq!((opened.kind(), opened.len()), (index.kind(), index.len()));
        let (mut a, mut b) = (vec![0.0; opened.dim()], vec![0.0; opened.dim()]);
        for id in 0..opened.len() as u32 {
            opened.key(id, &mut a).unwrap();
            index.key(id, &mut b).unwrap();
            assert_eq!(a, b);
        }
        // Not compared with a fresh index: how one is built may change, what a file says may not.
        assert!(answers(&*opened).iter().all(|found| found.hits.len() == 10));
    }
}
