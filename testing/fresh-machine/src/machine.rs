//! The README's two commands on a fresh machine, which has a Rust toolchain, git and a C compiler.
//!
//! The machine is a minimal Debian in a directory, with an empty cargo home and package lists that
//! are out of date. The kernel, its devices and the way to the registries are this machine's.

mod archive;
mod runner;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Parser;
use harness::packages::{Install, Package};
use harness::record::Record;
use xshell::{Shell, cmd};

use archive::{Archive, SUITE};
use runner::Runner;

/// What is installed beside the minimal system.
const EXTRA: &str = "ca-certificates,gcc,git,libc6-dev";

const PACKAGES: [Package; 1] = [Package::new("debootstrap", "debootstrap")];

/// Where the toolchain and the clone are on the fresh machine.
const TOOLCHAIN: &str = "opt/rust";
const CLONE: &str = "root/repository";

/// Run the README's two commands on a minimal Debian with stale package lists
///
/// The machine is a directory under target/fresh, with an empty cargo home. Requires root, and
/// debootstrap, which is installed if it is missing. The second command is run twice.
#[derive(Parser)]
#[command(name = "cargo xtask fresh", bin_name = "cargo xtask fresh")]
pub(crate) struct Fresh {
    #[command(flatten)]
    install: Install,
    #[command(flatten)]
    record: Record,
}

impl Fresh {
    pub(crate) fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let [demo, test] = commands(&sh.read_file("README.md")?)?;
        let commands = [("demo", &*demo), ("test", &test), ("test again", &test)];
        let times = run_each(sh, self.install, &commands)?;
        let how = format!("{} cores", thread::available_parallelism()?);
        self.record
            .conclude(sh, "cargo xtask prove fresh", &times, &how)
    }
}

fn run_each(sh: &Shell, install: Install, commands: &[(&str, &str)]) -> anyhow::Result<String> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "only root can set up a fresh machine"
    );
    let missing = install.ensure(sh, &PACKAGES, "a fresh machine")?;
    ensure!(missing.is_empty(), "a fresh machine requires debootstrap");
    let archive = Archive::of_this_machine(sh)?;
    let home = sh.current_dir().join("target/fresh");
    fs::create_dir_all(&home)?;
    let mut runner = Runner::new(&home.join("log"))?;
    let base = base(sh, &mut runner, &archive, &home)?;
    let machine = Machine::new(sh, &base, &archive, &home)?;
    let mut times = Vec::new();
    for (name, command) in commands {
        let took = machine
            .run(&mut runner, command)
            .with_context(|| format!("`{command}` failed on a fresh machine"))?;
        times.push(format!("{name} {} s", took.as_secs()));
    }
    Ok(times.join(", "))
}

/// Reads the first two commands of the README: the demo and the tests.
fn commands(readme: &str) -> anyhow::Result<[String; 2]> {
    let mut in_shell = false;
    let mut found = readme.lines().filter(|line| {
        if line.starts_with("```") {
            in_shell = *line == "```sh";
            return false;
        }
        in_shell
    });
    for command in ["cargo xtask demo", "cargo xtask test"] {
        let first = found.next().unwrap_or_default();
        ensure!(
            first == command,
            "the README must show `{command}` where it shows `{first}`"
        );
    }
    Ok(["cargo xtask demo".into(), "cargo xtask test".into()])
}

/// Directories of a minimal system with old package lists, packed. Made once.
fn base(
    sh: &Shell,
    runner: &mut Runner,
    archive: &Archive,
    home: &Path,
) -> anyhow::Result<PathBuf> {
    let packed = home.join(format!("{SUITE},{EXTRA}.tar"));
    if packed.exists() {
        return Ok(packed);
    }
    println!("creating a minimal {SUITE}, which later runs reuse");
    let dir = Directory::empty(home.join("base"))?;
    let mirror = &archive.mirror;
    let include = format!("--include={EXTRA}");
    let bootstrap = ["--variant=minbase", &include, SUITE].map(OsStr::new);
    let arguments = bootstrap
        .into_iter()
        .chain([dir.0.as_os_str(), mirror.as_ref()]);
    let arguments: Vec<_> = arguments.collect();
    runner.run("exec debootstrap \"$@\"", &arguments)?;
    // These lists are those of a machine image made at the release: months old and without the
    // suite's updates. By them, `apt-get install` succeeds with a Rust toolchain that is too old
    // for the workspace.
    let settings = dir.0.join("etc/apt/apt.conf.d/99acquire");
    sh.write_file(&settings, &archive.settings)?;
    let lists = "chroot \"$1\" apt-get --option=Acquire::Retries=5 --quiet update\n\
        chroot \"$1\" apt-get clean\n\
        rm -f \"$1\"/var/cache/apt/*.bin\n\
        find \"$1/var/lib/apt\" -exec touch --no-dereference --date='90 days ago' {} +";
    runner.run(lists, &[&dir.0])?;
    let (dir, part) = (&dir.0, packed.with_extension("part"));
    cmd!(
        sh,
        "tar --create --file {part} --numeric-owner --directory {dir} ."
    )
    .run()?;
    fs::rename(&part, &packed)?;
    Ok(packed)
}

/// A directory that is removed when it is dropped.
struct Directory(PathBuf);

impl Directory {
    /// Creates it. What an interrupted run left there is removed.
    fn empty(path: PathBuf) -> anyhow::Result<Self> {
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            println!("{} can't be removed: {error}", self.0.display());
        }
    }
}

/// The fresh machine.
struct Machine {
    root: Directory,
    toolchain: PathBuf,
    environment: Vec<OsString>,
}

impl Machine {
    fn new(sh: &Shell, base: &Path, archive: &Archive, home: &Path) -> anyhow::Result<Self> {
        let directory = Directory::empty(home.join("root"))?;
        let root = &directory.0;
        cmd!(
            sh,
            "tar --extract --file {base} --numeric-owner --directory {root}"
        )
        .run()?;
        sh.write_file(root.join("etc/apt/sources.list"), &archive.sources)?;
        sh.write_file(root.join("etc/apt/apt.conf.d/99acquire"), &archive.settings)?;
        let user = PathBuf::from(sh.var_os("HOME").unwrap_or_else(|| "/root".into()));
        let cargo = sh.var_os("CARGO_HOME").map(PathBuf::from);
        let cargo = cargo.unwrap_or_else(|| user.join(".cargo"));
        let system = [
            "etc/hosts",
            "etc/pip.conf",
            "etc/resolv.conf",
            "etc/ssl/certs",
            "usr/local/share/ca-certificates",
        ];
        let system = system.map(|path| (Path::new("/").join(path), root.join(path)));
        let users = [
            (user.join(".config/pip"), root.join("root/.config/pip")),
            (user.join(".pip"), root.join("root/.pip")),
            (
                cargo.join("config.toml"),
                root.join("root/.cargo/config.toml"),
            ),
        ];
        for (from, to) in system.into_iter().chain(users) {
            copy(sh, &from, &to)?;
        }
        fs::create_dir_all(root.join(TOOLCHAIN))?;
        let (here, clone) = (sh.current_dir(), root.join(CLONE));
        cmd!(sh, "git clone --quiet --no-hardlinks {here} {clone}").run()?;
        Ok(Self {
            root: directory,
            toolchain: cmd!(sh, "rustc --print sysroot").quiet().read()?.into(),
            environment: environment(),
        })
    }

    fn run(&self, runner: &mut Runner, command: &str) -> anyhow::Result<Duration> {
        println!("{command}, on a fresh machine");
        let script = format!(
            "mount --bind \"$1\" \"$1\"\n\
             mount --rbind /dev \"$1/dev\"\n\
             mount --rbind /sys \"$1/sys\"\n\
             mount -t proc proc \"$1/proc\"\n\
             mount --bind \"$2\" \"$1/{TOOLCHAIN}\"\n\
             mount -o remount,bind,ro \"$1/{TOOLCHAIN}\"\n\
             root=$1\n\
             shift 2\n\
             exec chroot \"$root\" /usr/bin/env -i \"$@\""
        );
        let shell = ["sh", "-c", &format!("cd /{CLONE} && exec {command}")].map(OsString::from);
        let arguments = [self.root.0.clone().into(), self.toolchain.clone().into()];
        let arguments = arguments.iter().chain(&self.environment).chain(&shell);
        runner.run(&script, &arguments.collect::<Vec<_>>())
    }
}

/// Copies a file or a directory if it exists. Links in a directory stay links: those to
/// certificates lead to the fresh machine's own.
fn copy(sh: &Shell, from: &Path, to: &Path) -> anyhow::Result<()> {
    if !from.exists() {
        return Ok(());
    }
    fs::create_dir_all(to.parent().context("a file lies in a directory")?)?;
    let options = [
        "--recursive",
        "--remove-destination",
        "--no-target-directory",
    ];
    // A link to a file elsewhere, as resolv.conf may be, is copied as the file.
    let links = if from.is_file() {
        "--dereference"
    } else {
        "--no-dereference"
    };
    cmd!(sh, "cp {options...} {links} {from} {to}")
        .quiet()
        .run()?;
    Ok(())
}

/// The variables as `NAME=value`: those of a login, and the way to the registries.
fn environment() -> Vec<OsString> {
    let path =
        format!("/{TOOLCHAIN}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let login = [("HOME", "/root"), ("LANG", "C.UTF-8"), ("PATH", &path)];
    let login = login.map(|(name, value)| format!("{name}={value}").into());
    let registries =
        std::env::vars_os().filter(|(name, _)| leads_to_a_registry(&name.to_string_lossy()));
    let registries = registries.map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    login.into_iter().chain(registries).collect()
}

/// Whether a variable says how registries are reached. Credentials are not passed on.
fn leads_to_a_registry(name: &str) -> bool {
    const PREFIXES: [&str; 8] = [
        "PIP_",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "GIT_SSL_",
        "SSL_CERT_",
        "REQUESTS_CA_",
    ];
    let name = name.to_ascii_uppercase();
    let secret = ["TOKEN", "PASSWORD", "SECRET", "CREDENTIAL"];
    let known = PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || name.ends_with("_PROXY")
        || name == "CURL_CA_BUNDLE";
    known && !secret.iter().any(|word| name.contains(word))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn the_readme_shows_the_demo_and_then_the_tests() {
        let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
        let readme = fs::read_to_string(readme).expect("a README");
        let found = commands(&readme).expect("both commands");
        assert_eq!(found, ["cargo xtask demo", "cargo xtask test"]);
    }

    #[rstest]
    #[case("")]
    #[case("cargo xtask demo\ncargo xtask test\n")]
    #[case("```sh\ncargo xtask demo\n```\n")]
    #[case("```rust\ncargo xtask demo\n```\n```sh\ncargo xtask test\n```\n")]
    #[case("```sh\ncargo xtask test\n```\n```sh\ncargo xtask demo\n```\n")]
    #[case("```sh\nmake\n```\n```sh\ncargo xtask demo\ncargo xtask test\n```\n")]
    fn a_readme_with_other_first_commands_is_refused(#[case] readme: &str) {
        commands(readme).expect_err("other commands");
    }

    #[rstest]
    #[case("PIP_CERT", true)]
    #[case("https_proxy", true)]
    #[case("SSL_CERT_FILE", true)]
    #[case("CARGO_HTTP_CAINFO", true)]
    #[case("CARGO_REGISTRIES_MINE_INDEX", true)]
    #[case("CARGO_REGISTRIES_MINE_TOKEN", false)]
    #[case("CARGO_TARGET_DIR", false)]
    #[case("CARGO_HOME", false)]
    #[case("RUSTFLAGS", false)]
    fn only_the_way_to_registries_is_passed_on(#[case] name: &str, #[case] passed: bool) {
        assert_eq!(leads_to_a_registry(name), passed);
    }
}
