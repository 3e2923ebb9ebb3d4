//! What macOS will ask of an executable before it runs it, read from the file.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, ensure};
use object::macho::{
    CPU_TYPE_ARM64, CS_ADHOC, LC_CODE_SIGNATURE, MH_EXECUTE, MachHeader64, PLATFORM_MACOS, Version,
};
use object::read::macho::{LoadCommandVariant, MachHeader, MachOFile64};
use object::{BigEndian, LittleEndian, Object, ObjectSection};

/// `dyld` looks libraries up by these names.
const SYSTEM: &str = "/usr/lib/libSystem.B.dylib";
pub const HYPERVISOR: &str =
    "/System/Library/Frameworks/Hypervisor.framework/Versions/A/Hypervisor";

/// A version of macOS: major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MacOs(pub u16, pub u8);

impl fmt::Display for MacOs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "macOS {}.{}", self.0, self.1)
    }
}

impl From<Version> for MacOs {
    fn from(version: Version) -> Self {
        Self(version.major(), version.minor())
    }
}

/// An executable that would start.
#[derive(Debug, PartialEq, Eq)]
pub struct Executable {
    /// The oldest macOS that it says it is for.
    pub built_for: MacOs,
    /// The oldest that has every function it calls of the hypervisor framework.
    pub calls_need: MacOs,
    /// How many functions of the framework it calls.
    pub calls: usize,
}

/// Checks the load commands of an executable that uses the hypervisor. `since` has the framework's functions and the macOS that each came with.
pub fn check(bytes: &[u8], since: &BTreeMap<String, MacOs>) -> anyhow::Result<Executable> {
    let header = MachHeader64::<LittleEndian>::parse(bytes, 0)?;
    let endian = header.endian().context("not a Mach-O file of 64 bits")?;
    ensure!(header.cputype(endian) == CPU_TYPE_ARM64, "not for arm64");
    ensure!(header.filetype(endian) == MH_EXECUTE, "not an executable");

    let (mut built_for, mut entry, mut signed) = (None, None, false);
    let mut libraries = Vec::new();
    let mut commands = header.load_commands(endian, bytes, 0)?;
    while let Some(command) = commands.next()? {
        match command.variant()? {
            LoadCommandVariant::BuildVersion(build, _) => {
                ensure!(
                    build.platform.get(endian) == PLATFORM_MACOS,
                    "not for macOS"
                );
                built_for = Some(build.minos.get(endian).into());
            }
            LoadCommandVariant::EntryPoint(main) => entry = Some(main.entryoff.get(endian)),
            LoadCommandVariant::Dylib(dylib) => {
                let name = command.string(endian, dylib.dylib.name)?;
                libraries.push(String::from_utf8_lossy(name));
            }
            LoadCommandVariant::LinkeditData(data) if command.cmd() == LC_CODE_SIGNATURE => {
                for blob in data.code_signature(endian, bytes)?.blobs() {
                    if let Some(directory) = blob?.code_directory()? {
                        signed |= directory.header().flags.get(BigEndian).contains(CS_ADHOC);
                    }
                }
            }
            _ => {}
        }
    }
    let built_for =
        built_for.context("no LC_BUILD_VERSION: dyld takes it for a program of 2018")?;
    let entry = entry.context("no LC_MAIN: it has no entry point")?;
    ensure!(
        signed,
        "no ad hoc signature: Apple silicon kills unsigned programs"
    );
    for library in [SYSTEM, HYPERVISOR] {
        ensure!(
            libraries.iter().any(|name| name == library),
            "it doesn't load {library}"
        );
    }
    let foreign = libraries
        .iter()
        .find(|name| !name.starts_with("/usr/lib/") && !name.starts_with("/System/"));
    ensure!(
        foreign.is_none(),
        "it loads {foreign:?}, which is not macOS's"
    );

    let file = MachOFile64::<LittleEndian>::parse(bytes)?;
    let text = file
        .section_by_name("__text")
        .and_then(|text| text.file_range());
    let (start, len) = text.context("no code")?;
    ensure!(
        (start..start + len).contains(&entry),
        "its entry point lies outside its code"
    );
    let (mut calls, mut calls_need) = (0, MacOs(0, 0));
    for import in file.imports()? {
        let import = import?;
        if import.library() != HYPERVISOR.as_bytes() {
            continue;
        }
        let name = import
            .name()
            .into_name()
            .context("an import without a name")?;
        let name = String::from_utf8_lossy(name);
        let since = since
            .get(name.trim_start_matches('_'))
            .with_context(|| format!("{name} is no function of the framework"))?;
        calls_need = calls_need.max(*since);
        calls += 1;
    }
    ensure!(calls > 0, "it calls nothing of the hypervisor framework");
    Ok(Executable {
        built_for,
        calls_need,
        calls,
    })
}
