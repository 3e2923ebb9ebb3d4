//! The controller's state as bytes: the registers of the distributor, and those of each
//! redistributor in the order in which the vCPUs were created.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use crate::calls::{Code, Outcome};
use crate::gic_registers::Registers;
use crate::machine::{self, with_gic};
use crate::vcpus::{self, Shared};

/// The first word, and the version.
const FORMAT: u64 = u64::from_le_bytes(*b"fakeGIC1");

/// Returns the state, if no vCPU runs.
pub(super) fn capture() -> Result<Vec<u8>, Code> {
    let mut words = vec![FORMAT];
    with_gic(|gic| {
        append(&mut words, &gic.distributor);
        Ok(())
    })?;
    let vcpus = vcpus::in_order();
    if vcpus.iter().any(|vcpu| vcpu.running.load(Ordering::SeqCst)) {
        return Err(Code::BUSY);
    }
    words.push(vcpus.len() as u64);
    for vcpu in vcpus {
        words.push(vcpu.affinity.load(Ordering::SeqCst));
        let registers = vcpu.redistributor.lock();
        append(
            &mut words,
            &registers.unwrap_or_else(PoisonError::into_inner),
        );
    }
    Ok(words.into_iter().flat_map(u64::to_le_bytes).collect())
}

/// Restores a state. No vCPU has run, and each has an affinity of its own, that of the state.
pub(super) fn restore(state: &[u8]) -> Outcome {
    if machine::with(|machine| Ok(machine.has_run))? {
        return Err(Code::ERROR);
    }
    with_gic(|_| Ok(()))?;
    let parsed = parse(state).ok_or(Code::BAD_ARGUMENT)?;
    let vcpus = vcpus::in_order();
    let affinity = |vcpu: &Shared| vcpu.affinity.load(Ordering::SeqCst);
    let own: Vec<u64> = vcpus.iter().map(|vcpu| affinity(vcpu)).collect();
    let distinct = own
        .iter()
        .enumerate()
        .all(|(n, value)| !own[..n].contains(value));
    let same = own
        .iter()
        .eq(parsed.vcpus.iter().map(|(affinity, _)| affinity));
    if !distinct || !same {
        return Err(Code::BAD_ARGUMENT);
    }
    with_gic(|gic| {
        gic.distributor = parsed.distributor;
        Ok(())
    })?;
    for (vcpu, (_, registers)) in vcpus.iter().zip(parsed.vcpus) {
        *vcpu
            .redistributor
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = registers;
    }
    Ok(())
}

struct Parsed {
    distributor: Registers,
    /// The affinity and the registers of each vCPU.
    vcpus: Vec<(u64, Registers)>,
}

fn append(words: &mut Vec<u64>, registers: &Registers) {
    words.push(registers.len() as u64);
    words.extend(
        registers
            .iter()
            .flat_map(|(register, value)| [u64::from(*register), *value]),
    );
}

fn parse(state: &[u8]) -> Option<Parsed> {
    let (words, rest) = state.as_chunks::<8>();
    let mut words = words.iter().copied().map(u64::from_le_bytes);
    if !rest.is_empty() || words.next()? != FORMAT {
        return None;
    }
    let distributor = take(&mut words)?;
    let count = words.next()?;
    let vcpus = (0..count).map(|_| Some((words.next()?, take(&mut words)?)));
    let parsed = Parsed {
        distributor,
        vcpus: vcpus.collect::<Option<_>>()?,
    };
    words.next().is_none().then_some(parsed)
}

fn take(words: &mut impl Iterator<Item = u64>) -> Option<Registers> {
    let count = words.next()?;
    let registers = (0..count).map(|_| Some((u32::try_from(words.next()?).ok()?, words.next()?)));
    registers.collect()
}
