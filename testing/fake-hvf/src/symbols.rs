//! The addresses of the framework's functions, for `dlsym`.

use std::ffi::{CStr, c_void};

use crate::gic::*;
use crate::memory::*;
use crate::systems;
use crate::vcpu::*;
use crate::vcpu_registers::*;
use crate::vcpu_sme::*;
use crate::vm::*;

/// A function of the framework.
struct Function {
    name: &'static str,
    address: fn() -> *mut c_void,
}

macro_rules! addresses {
    ($($since:ident: $($name:ident)*;)*) => {
        &[$($(Function {
            name: stringify!($name),
            address: || $name as *mut c_void,
        },)*)*]
    };
}

const FUNCTIONS: &[Function] = systems::with_functions!(addresses);

/// Returns the address of a function, if this system has it.
pub(crate) fn symbol(name: &CStr) -> Option<*mut c_void> {
    let mut functions = FUNCTIONS.iter();
    let found = functions.find(|function| function.name.as_bytes() == name.to_bytes())?;
    systems::has(found.name).then(found.address)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise `dlsym` would not find it.
    #[test]
    fn each_exported_function_has_a_version() {
        let sources = [
            include_str!("gic.rs"),
            include_str!("gic/delivery.rs"),
            include_str!("memory.rs"),
            include_str!("vcpu.rs"),
            include_str!("vcpu_registers.rs"),
            include_str!("vcpu_sme.rs"),
            include_str!("vm.rs"),
        ];
        let lines = sources.into_iter().flat_map(str::lines);
        let exported = lines.filter_map(|line| line.split_once("fn hv_"));
        let mut exported: Vec<_> = exported
            .filter_map(|(_, rest)| rest.split_once(['(', ' ']))
            .map(|(name, _)| format!("hv_{name}"))
            .collect();
        let mut known: Vec<_> = FUNCTIONS.iter().map(|function| function.name).collect();
        exported.sort();
        known.sort_unstable();
        assert_eq!(exported, known);
    }
}
