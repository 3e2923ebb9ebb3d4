//! Runs the built tool in a temporary directory with the RAM of a guest.

#![allow(dead_code, reason = "each test binary uses its part")]

#[cfg(target_os = "linux")]
pub(crate) mod held;
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
pub(crate) mod mapped;
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
pub(crate) mod missing;
pub(crate) mod oracle;
#[cfg(target_os = "linux")]
pub(crate) mod ram_file;
#[cfg(target_os = "linux")]
pub(crate) mod server;
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
pub(crate) mod vmm;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) const RAMSNAP: &str = env!("CARGO_BIN_EXE_ramsnap");
pub(crate) const PAGE: u64 = 4096;
pub(crate) const RAM: u64 = 8 << 20;

/// Words that no message contains: names of functions, types and libraries.
const NOT_FOR_OPERATORS: [&str; 12] = [
    "panicked",
    "::",
    "Os {",
    "Error(",
    "`recover`",
    "`no_clobber`",
    "replace_only",
    "write_full",
    "push_pages",
    "frame descriptor",
    "this library",
    "Flock",
];

/// The exit status and output of a run.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    pub(crate) fn of(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let ended = Self {
            code: output.status.code(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        };
        // The standard library panics before `main` if a limit of memory permits the program and
        // not the stack of its signal handler. Which limit that is depends on the program's size.
        if ended
            .err
            .contains("failed to allocate an alternative stack")
        {
            return ended;
        }
        for words in NOT_FOR_OPERATORS {
            assert!(
                !ended.err.contains(words),
                "{words}: {command:?}: {ended:?}"
            );
        }
        ended
    }

    #[track_caller]
    pub(crate) fn good(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    /// Asserts the exit code, and that the error contains all of `words`.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in {self:?}");
        }
        self
    }

    /// Asserts a warning that contains all of `words`.
    #[track_caller]
    pub(crate) fn warns(self, words: &[&str]) -> Self {
        for word in ["warning"].iter().chain(words) {
            assert!(self.err.contains(word), "no {word:?} in {self:?}");
        }
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A temporary working directory.
pub(crate) struct Work {
    dir: TempDir,
}

impl Work {
    /// Creates the file `ram`: 8 MiB, of which three ranges were written.
    pub(crate) fn with_ram() -> Self {
        let work = Self::empty();
        let ram = work.create("ram", RAM);
        for (page, pages) in [(0, 64), (700, 3), (2000, 48)] {
            ram.write_all_at(&noise(page + 1, pages * PAGE), page * PAGE)
                .unwrap();
        }
        work
    }

    /// Creates `ram`, and `full.mem`, `d1.mem` and `d2.mem`, a packed chain whose last state is
    /// `ram`. `first` and `second` are the states before.
    pub(crate) fn with_chain() -> Self {
        let work = Self::with_ram();
        work.good("dump ram -o full.mem");
        work.copy("ram", "first");
        work.change(10, 5);
        work.zero(20);
        work.good("diff full.mem --ram ram -o d1.mem");
        work.copy("ram", "second");
        work.change(12, 2);
        work.change(1500, 1);
        work.good("diff full.mem d1.mem --ram ram -o d2.mem");
        work
    }

    pub(crate) fn empty() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Creates a sparse file.
    pub(crate) fn create(&self, name: &str, len: u64) -> File {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(self.path(name));
        let file = file.unwrap();
        file.set_len(len).unwrap();
        file
    }

    /// Writes pages of `ram`.
    pub(crate) fn change(&self, page: u64, pages: u64) {
        let ram = File::options().write(true).open(self.path("ram")).unwrap();
        ram.write_all_at(&noise(page + 1000, pages * PAGE), page * PAGE)
            .unwrap();
    }

    pub(crate) fn zero(&self, page: u64) {
        let ram = File::options().write(true).open(self.path("ram")).unwrap();
        ram.write_all_at(&[0; PAGE as usize], page * PAGE).unwrap();
    }

    pub(crate) fn copy(&self, from: &str, to: &str) {
        fs::copy(self.path(from), self.path(to)).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Flips a bit.
    pub(crate) fn rot(&self, name: &str, offset: usize) {
        let mut bytes = self.read(name);
        bytes[offset] ^= 1;
        fs::write(self.path(name), bytes).unwrap();
    }

    #[track_caller]
    pub(crate) fn assert_same(&self, one: &str, other: &str) {
        assert!(self.read(one) == self.read(other), "{one} is not {other}");
    }

    /// Returns the names of all files, including hidden ones.
    pub(crate) fn files(&self) -> Vec<String> {
        list(self.dir.path())
    }

    /// Returns a command that runs the tool with `arguments`, separated by single spaces.
    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(RAMSNAP);
        command
            .args(arguments.split(' '))
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .env_remove("CLICOLOR_FORCE");
        command
    }

    pub(crate) fn run(&self, arguments: &str) -> Ended {
        Ended::of(&mut self.command(arguments))
    }

    #[track_caller]
    pub(crate) fn good(&self, arguments: &str) -> Ended {
        self.run(arguments).good()
    }

    /// Asserts a failure that changes and adds no file.
    #[track_caller]
    pub(crate) fn fails(&self, arguments: &str, code: i32, words: &[&str]) {
        let before = self.contents();
        self.run(arguments).fails(code, words);
        assert!(
            self.contents() == before,
            "{:?} changed: {arguments}",
            self.files()
        );
    }

    pub(crate) fn contents(&self) -> Vec<(String, Vec<u8>)> {
        let files = self.files().into_iter();
        files.map(|name| (name.clone(), self.read(&name))).collect()
    }
}

pub(crate) fn list(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// Returns bytes that neither repeat nor compress.
pub(crate) fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    };
    (0..len / 8).flat_map(|_| next().to_le_bytes()).collect()
}

/// Returns the exit code of a shell for the signal.
pub(crate) fn code_of(signal: nix::sys::signal::Signal) -> Option<i32> {
    Some(128 + signal as i32)
}
