//! A disk that fails, for drills and tests: a library in C that is preloaded into a program (`tests/faults/faults.c` says what
//! it does and what it does not see), compiled where it is used.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{EvalError, Result};

const SOURCE: &str = include_str!("../../../tests/faults/faults.c");

/// Numbers in the control file.
const NUMBERS: usize = 8;

/// Kinds of operations that can fail, as bits.
pub mod op {
    /// Writes to files.
    pub const WRITE: u64 = 1;
    /// fsync and fdatasync, of files and folders.
    pub const SYNC: u64 = 2;
    /// Renames.
    pub const RENAME: u64 = 4;
    /// Files that are made, and links.
    pub const CREATE: u64 = 8;
    /// Files that get another length or space.
    pub const RESIZE: u64 = 16;
    /// Folders that are made.
    pub const MKDIR: u64 = 32;
    /// What needs space on a disk.
    pub const SPACE: u64 = WRITE | CREATE | RESIZE | MKDIR;
    /// Everything that changes a disk, but removals.
    pub const ALL: u64 = SPACE | SYNC | RENAME;
}

/// The compiled library, and how it behaves in the programs that it is put before.
#[derive(Debug)]
pub struct FailingDisk {
    library: PathBuf,
    control: File,
    control_path: PathBuf,
    root: PathBuf,
    aside: Option<PathBuf>,
}

impl FailingDisk {
    /// Compiles the library into `scratch`, for files below `root`; with `power`, a process that dies leaves what it had synced.
    ///
    /// # Errors
    /// No C compiler (`cc`), or a folder that cannot be written.
    pub fn new(scratch: &Path, root: &Path, power: bool) -> Result<FailingDisk> {
        let writing = |path: &Path| {
            let path = path.to_path_buf();
            move |source| EvalError::Io { action: "write", path, source }
        };
        let (source, library) = (scratch.join("faults.c"), scratch.join("faults.so"));
        std::fs::write(&source, SOURCE).map_err(writing(&source))?;
        let mut compiler = Command::new("cc");
        compiler.args(["-O1", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source).args(["-ldl", "-lpthread"]);
        let output = compiler.output().map_err(|source| EvalError::Io { action: "run", path: "cc".into(), source })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(EvalError::Compiler(said));
        }
        let control_path = scratch.join("control");
        std::fs::write(&control_path, [0; 8 * NUMBERS]).map_err(writing(&control_path))?;
        let control = File::options().read(true).write(true).open(&control_path).map_err(writing(&control_path))?;
        let aside = power.then(|| scratch.join("aside"));
        if let Some(aside) = &aside {
            std::fs::create_dir_all(aside).map_err(writing(aside))?;
        }
        let root = root.canonicalize().map_err(|source| EvalError::Io { action: "find", path: root.into(), source })?;
        Ok(FailingDisk { library, control, control_path, root, aside })
    }

    /// Puts the library before a program that is to be started.
    pub fn below(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library).env("FAULTS_ROOT", &self.root);
        command.env("FAULTS_CONTROL", &self.control_path);
        if let Some(aside) = &self.aside {
            command.env("FAULTS_ASIDE", aside);
        }
    }

    /// From now on these operations fail with this error of the system, once so many bytes more have been written.
    ///
    /// # Errors
    /// A control file that cannot be written.
    pub fn fail(&self, operations: u64, errno: i32, after_bytes: u64) -> Result<()> {
        self.set(2, after_bytes)?;
        self.set(3, 0)?;
        self.set(0, operations)?;
        self.set(1, u64::from(errno.unsigned_abs()))
    }

    /// From now on nothing fails.
    ///
    /// # Errors
    /// As [`fail`](Self::fail).
    pub fn mend(&self) -> Result<()> {
        self.set(1, 0)
    }

    /// The next program dies at its operation of this number, counted from 1; 0: not at all. Nothing fails.
    ///
    /// # Errors
    /// As [`fail`](Self::fail).
    pub fn kill_at(&self, operation: u64) -> Result<()> {
        (0..NUMBERS).try_for_each(|number| self.set(number, 0))?;
        self.set(4, operation)
    }

    /// Operations so far.
    ///
    /// # Errors
    /// A control file that cannot be read.
    pub fn operations(&self) -> Result<u64> {
        self.number(5)
    }

    /// Operations that have failed so far.
    ///
    /// # Errors
    /// As [`operations`](Self::operations).
    pub fn failed(&self) -> Result<u64> {
        self.number(7)
    }

    fn set(&self, number: usize, value: u64) -> Result<()> {
        let written = self.control.write_all_at(&value.to_ne_bytes(), 8 * number as u64);
        written.map_err(|source| EvalError::Io { action: "write", path: self.control_path.clone(), source })
    }

    fn number(&self, number: usize) -> Result<u64> {
        let mut bytes = [0; 8];
        let read = self.control.read_exact_at(&mut bytes, 8 * number as u64);
        read.map_err(|source| EvalError::Io { action: "read", path: self.control_path.clone(), source })?;
        Ok(u64::from_ne_bytes(bytes))
    }
}
