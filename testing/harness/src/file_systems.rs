//! File systems on the command line.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use file_systems::FileSystem;

use crate::packages::Package;

/// Parses the name of one of `all`.
pub fn parser(
    all: impl Iterator<Item = &'static FileSystem>,
) -> impl TypedValueParser<Value = &'static FileSystem> {
    let values = all.map(|fs| PossibleValue::new(fs.name).help(fs.title));
    PossibleValuesParser::new(values).try_map(|name| {
        FileSystem::named(&name).ok_or_else(|| format!("there is no file system {name}"))
    })
}

/// Returns the packages with the tools by which this machine makes and mounts `all`, each once.
pub fn packages(all: impl Iterator<Item = &'static FileSystem>) -> Vec<Package> {
    let mut packages = Vec::new();
    for local in all.filter_map(|fs| fs.disk_below()?.local) {
        for package in local.packages {
            let package = Package::new(package.name, package.program);
            if !packages.contains(&package) {
                packages.push(package);
            }
        }
    }
    packages
}
