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
pub(crate) const HYPERVISOR: &str =
    "/System/Library/Frameworks/Hypervisor.framework/Versions/A/Hypervisor";

/// A version of macOS: major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MacOs(pub u16, pub u8);

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
pub(crate) struct Executable {
    /// The oldest macOS that it says it is for.
    pub built_for: MacOs,
    /// The oldest that has every function it calls of the hypervisor framework.
    pub calls_need: MacOs,
    /// How many functions of the framework it calls.
    pub calls: usize,
}

/// Checks the load commands of an executable. `hypervisor` has the functions of the hypervisor
/// framework and the macOS that each came with, for a program that uses it; `None` for a program
/// that must not load it.
pub(crate) fn check(
    bytes: &[u8],
    hypervisor: Option<&BTreeMap<String, MacOs>>,
) -> anyhow::Result<Executable> {
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
    let built_for = built_for
        .context("no LC_BUILD_VERSION: the version of macOS that it is built for is unknown")?;
    let entry = entry.context("no LC_MAIN: it has no entry point")?;
    ensure!(
        signed,
        "no ad hoc signature: Apple silicon kills unsigned programs"
    );
    let loads = |library| libraries.iter().any(|name| name == library);
    ensure!(loads(SYSTEM), "it doesn't load {SYSTEM}");
    match hypervisor {
        Some(_) => ensure!(loads(HYPERVISOR), "it doesn't load {HYPERVISOR}"),
        None => ensure!(!loads(HYPERVISOR), "it loads {HYPERVISOR}"),
    }
    let foreign = libraries
        .iter()
        .find(|name| !name.starts_with("/usr/lib/") && !name.starts_with("/System/"));
    ensure!(
        foreign.is_none(),
        "it loads {foreign:?}, which is not part of macOS"
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
        let since = hypervisor
            .and_then(|since| since.get(name.trim_start_matches('_')))
            .with_context(|| format!("{name} is not a function of the framework"))?;
        calls_need = calls_need.max(*since);
        calls += 1;
    }
    ensure!(
        calls > 0 || hypervisor.is_none(),
        "it calls nothing of the hypervisor framework"
    );
    Ok(Executable {
        built_for,
        calls_need,
        calls,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const CODE: u32 = 0x1000;
    const SYMBOLS: u32 = 0x1010;
    const NAMES: u32 = 0x1020;
    const SIGNATURE: u32 = 0x1100;

    /// The least that passes, by parts to spoil. Numbers are those of Apple's `mach-o/loader.h`,
    /// `nlist.h` and `cs_blobs.h`.
    struct Parts {
        cpu: u32,
        kind: u32,
        platform: u32,
        entry: u32,
        commands: Vec<u32>,
        libraries: Vec<&'static str>,
        function: &'static str,
        signature_flags: u32,
    }

    const MAIN: u32 = 0x8000_0028;
    const BUILD_VERSION: u32 = 0x32;
    const SIGNED: u32 = 0x1d;
    const EXTRA_LIBRARY: &str = "/opt/homebrew/lib/libzstd.dylib";

    impl Parts {
        fn whole() -> Self {
            Self {
                cpu: 0x0100_000c,
                kind: 2,
                platform: 1,
                entry: CODE,
                commands: vec![0x19, 2, MAIN, BUILD_VERSION, SIGNED],
                libraries: vec![HYPERVISOR, SYSTEM],
                function: "_hv_vm_map",
                signature_flags: 2,
            }
        }

        fn file(&self) -> Vec<u8> {
            let mut commands: Vec<Vec<u8>> =
                self.commands.iter().map(|id| self.body(*id)).collect();
            for library in &self.libraries {
                let mut body = words(&[0xc, 0, 24, 0, 0, 0]);
                body.extend(library.bytes());
                body.push(0);
                commands.push(body);
            }
            for body in &mut commands {
                body.resize(body.len().next_multiple_of(8), 0);
                let len = u32::try_from(body.len()).expect("small").to_le_bytes();
                body[4..8].copy_from_slice(&len);
            }
            let number = u32::try_from(commands.len()).expect("few");
            let commands = commands.concat();
            let len = u32::try_from(commands.len()).expect("small");
            // Two-level names: each import says its library.
            let mut file = words(&[0xfeed_facf, self.cpu, 0, self.kind, number, len, 0x80, 0]);
            file.extend(commands);
            file.resize(SYMBOLS as usize, 0);
            // An undefined external symbol of the first library.
            file.extend(words(&[1, 0x0100_0001, 0, 0]));
            file.resize(NAMES as usize + 1, 0);
            file.extend(self.function.bytes());
            file.resize(SIGNATURE as usize, 0);
            let directory = [
                0xfade_0c02,
                44,
                0x2_0001,
                self.signature_flags,
                44,
                44,
                0,
                0,
                0,
                0,
                0,
            ];
            for word in [0xfade_0cc0, 64, 1, 0, 20].into_iter().chain(directory) {
                file.extend(u32::to_be_bytes(word));
            }
            file
        }

        fn body(&self, id: u32) -> Vec<u8> {
            match id {
                0x19 => {
                    let mut body = [words(&[id, 0]), name("__TEXT")].concat();
                    body.extend(words(&[0, 0, 0x2000, 0, 0, 0, 0x2000, 0, 5, 5, 1, 0]));
                    body.extend([name("__text"), name("__TEXT")].concat());
                    body.extend(words(&[CODE, 0, 16, 0, CODE, 0, 0, 0, 0, 0, 0, 0]));
                    body
                }
                2 => words(&[id, 0, SYMBOLS, 1, NAMES, 0x40]),
                MAIN => words(&[id, 0, self.entry, 0, 0, 0]),
                BUILD_VERSION => words(&[id, 0, self.platform, 11 << 16, 11 << 16, 0]),
                _ => words(&[id, 0, SIGNATURE, 64]),
            }
        }
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn name(name: &str) -> Vec<u8> {
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(16, 0);
        bytes
    }

    fn checked(parts: &Parts) -> anyhow::Result<Executable> {
        let since = [("hv_vm_map", MacOs(11, 0)), ("hv_gic_create", MacOs(15, 0))];
        let since = since.map(|(name, since)| (name.to_owned(), since));
        check(&parts.file(), Some(&since.into()))
    }

    #[rstest]
    #[case("_hv_vm_map", MacOs(11, 0))]
    #[case("_hv_gic_create", MacOs(15, 0))]
    fn executable_requires_the_macos_of_its_newest_function(
        #[case] function: &'static str,
        #[case] calls_need: MacOs,
    ) {
        let parts = Parts {
            function,
            ..Parts::whole()
        };
        let found = Executable {
            built_for: MacOs(11, 0),
            calls_need,
            calls: 1,
        };
        assert_eq!(checked(&parts).expect("it passes"), found);
    }

    #[test]
    fn a_program_without_a_hypervisor_must_not_load_the_framework() {
        let parts = Parts {
            libraries: vec![SYSTEM],
            ..Parts::whole()
        };
        let found = check(&parts.file(), None).expect("it passes");
        assert_eq!(found.calls, 0);
        let error = check(&Parts::whole().file(), None).expect_err("it loads the framework");
        assert!(error.to_string().contains("it loads /System"), "{error}");
    }

    #[rstest]
    #[case::another_processor("not for arm64", |parts: &mut Parts| parts.cpu = 0x0100_0007)]
    #[case::a_library("not an executable", |parts: &mut Parts| parts.kind = 6)]
    #[case::for_a_phone("not for macOS", |parts: &mut Parts| parts.platform = 2)]
    #[case::no_version("no LC_BUILD_VERSION", |parts: &mut Parts| parts.commands.retain(|id| *id != BUILD_VERSION))]
    #[case::no_entry("no LC_MAIN", |parts: &mut Parts| parts.commands.retain(|id| *id != MAIN))]
    #[case::entry_in_data("outside its code", |parts: &mut Parts| parts.entry = NAMES)]
    #[case::unsigned("no ad hoc signature", |parts: &mut Parts| parts.commands.retain(|id| *id != SIGNED))]
    #[case::signed_otherwise("no ad hoc signature", |parts: &mut Parts| parts.signature_flags = 0)]
    #[case::without_the_system("doesn't load /usr/lib/libSystem", |parts: &mut Parts| parts.libraries.truncate(1))]
    #[case::without_the_framework("doesn't load /System", |parts: &mut Parts| parts.libraries = vec![SYSTEM])]
    #[case::a_library_of_this_machine("not part of macOS", |parts: &mut Parts| parts.libraries.push(EXTRA_LIBRARY))]
    #[case::an_unknown_function("not a function of the framework", |parts: &mut Parts| parts.function = "_hv_vm_mop")]
    #[case::nothing_called("calls nothing", |parts: &mut Parts| parts.libraries.swap(0, 1))]
    fn what_macos_would_not_start_is_refused_with_the_reason(
        #[case] reason: &str,
        #[case] spoil: fn(&mut Parts),
    ) {
        let mut parts = Parts::whole();
        spoil(&mut parts);
        let said = format!("{:#}", checked(&parts).expect_err("it is refused"));
        assert!(said.contains(reason), "{said}");
    }
}
