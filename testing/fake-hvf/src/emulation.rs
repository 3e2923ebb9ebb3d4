//! Running a vCPU's instructions in Unicorn until the framework would exit.

mod access;
mod callbacks;
mod decode;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::calls::Code;
use crate::exit::Exit;
use crate::identity;
use crate::interrupts::Lines;
use crate::machine;
use crate::memory::{self, Mapped};
use crate::registers;
use crate::state::{State, Stop};
use crate::unicorn::{Engine, UnicornError, register};
use crate::vcpus::{self, Shared};

/// SCR_EL3 and HCR_EL2: the levels below are AArch64 and not secure.
const CONTROL_OF_HIGHER_LEVELS: [(u16, u64); 2] = [(0xf088, 1 << 10 | 1), (0xe088, 1 << 31)];

/// A processor and its state.
pub(crate) struct Emulation {
    pub engine: Engine,
    /// What callbacks use while the engine runs, and this thread otherwise.
    state: NonNull<State>,
    /// What is mapped into the engine.
    mapped: Vec<Mapped>,
    /// The version of the translations that are mapped.
    translated: u64,
    /// The engine translates by the tables of [`identity`].
    translates: bool,
    executed: Duration,
}

impl Emulation {
    pub(crate) fn new(shared: Arc<Shared>) -> Result<Self, UnicornError> {
        let engine = Engine::new()?;
        for (register, value) in CONTROL_OF_HIGHER_LEVELS {
            engine.write_system(register, value)?;
        }
        let state = Box::new(State::new(shared));
        let emulation = Self {
            engine,
            state: NonNull::from(Box::leak(state)),
            mapped: Vec::new(),
            translated: 0,
            translates: false,
            executed: Duration::ZERO,
        };
        callbacks::add(&emulation.engine, emulation.state)?;
        Ok(emulation)
    }

    pub(crate) fn state(&mut self) -> &mut State {
        // SAFETY: the state lives until `drop`. Only callbacks use it besides, which run inside
        // `Engine::run`, where no reference from here exists.
        unsafe { self.state.as_mut() }
    }

    /// Returns the engine and the state.
    pub(crate) fn parts(&mut self) -> (&Engine, &mut State) {
        // SAFETY: as in `state`. The engine does not run.
        (&self.engine, unsafe { self.state.as_mut() })
    }

    pub(crate) fn executed(&self) -> Duration {
        self.executed
    }

    pub(crate) fn trap_breakpoints(&mut self, trap: bool) {
        self.state().trap_breakpoints = trap;
    }

    /// Runs the guest until an exit, which clears its pending interrupts.
    pub(crate) fn run(&mut self) -> Result<Exit, Code> {
        let exit = loop {
            match self.step() {
                Ok(None) => {}
                Ok(Some(exit)) => break Ok(exit),
                Err(code) => break Err(code),
            }
        };
        self.state().lines = Lines::default();
        exit
    }

    /// Runs the guest until something happens. Returns the exit, if it is one.
    fn step(&mut self) -> Result<Option<Exit>, Code> {
        let state = self.state();
        let shared = Arc::clone(&state.shared);
        shared.attention.store(false, Ordering::SeqCst);
        if shared.canceled.swap(false, Ordering::SeqCst) {
            return Ok(Some(Exit::Canceled));
        }
        if state.timer_fires() {
            return Ok(Some(Exit::VtimerActivated));
        }
        state.stop = None;
        state.page = None;
        shared.emulating.store(true, Ordering::SeqCst);
        let result = self.follow_memory().and_then(|()| {
            if shared.stale_code.swap(false, Ordering::SeqCst) {
                self.forget_code()?;
            }
            let pc = self.engine.read(register::PC)?;
            self.state().pc = pc;
            let start = Instant::now();
            let result = self.engine.run(pc);
            self.executed += start.elapsed();
            let level = registers::level(self.engine.read(register::PSTATE)?);
            self.state().translations.leave_engine_at(level);
            result
        });
        shared.storing.store(false, Ordering::SeqCst);
        shared.emulating.store(false, Ordering::SeqCst);
        let stopped = self.stopped(result);
        stopped.map_err(|error| {
            eprintln!("fake-hvf: Unicorn failed: {error:?}");
            Code::ERROR
        })?
    }

    /// Maps into the engine what the guest may read, if it has changed.
    fn follow_memory(&mut self) -> Result<(), UnicornError> {
        let memory = memory::read();
        let pstate = self.engine.read(register::PSTATE)?;
        let state = self.state();
        let shared = Arc::clone(&state.shared);
        let memory_changes = shared.memory_version.load(Ordering::SeqCst) != memory.version;
        if memory_changes {
            state.translations.forget();
        }
        state.follow_translation(pstate);
        let translated = state.translations.version();
        if translated == self.translated {
            return Ok(());
        }
        let translations = &self.state().translations;
        let control = translations.control();
        let (level, readable) = if translations.are_enabled() {
            let mapped = translations.mapped();
            let beside = identity::beside(&mapped);
            (Some(translations.engine_level()), [mapped, beside].concat())
        } else {
            (None, memory.readable())
        };
        for old in self.mapped.extract_if(.., |old| !readable.contains(old)) {
            self.engine.unmap(old.guest_start, old.size as usize)?;
        }
        for new in readable {
            if self.mapped.contains(&new) {
                continue;
            }
            let host = std::ptr::with_exposed_provenance_mut(new.host_start);
            let size = new.size as usize;
            // SAFETY: the memory is mapped in this process until `hv_vm_unmap` has returned, which
            // waits until this function has unmapped it.
            unsafe { self.engine.map(new.guest_start, size, host) }?;
            self.mapped.push(new);
        }
        if level.is_some() || self.translates {
            identity::set(&self.engine, level, control, translated)?;
            self.translates = level.is_some();
        }
        self.translated = translated;
        shared
            .memory_version
            .store(memory.version, Ordering::SeqCst);
        Ok(())
    }

    /// Forgets all translated code.
    fn forget_code(&self) -> Result<(), UnicornError> {
        for mapped in &self.mapped {
            let end = mapped.guest_start.saturating_add(mapped.size);
            self.engine.forget_code(mapped.guest_start..end)?;
        }
        Ok(())
    }

    /// Handles a stop of the engine. Returns the exit, if it is one.
    fn stopped(
        &mut self,
        result: Result<(), UnicornError>,
    ) -> Result<Result<Option<Exit>, Code>, UnicornError> {
        let (engine, state) = self.parts();
        let pc = state.pc;
        let stop = match state.stop.take() {
            Some(stop) => stop,
            None => decode::idle(pc, state.instruction(pc))
                .ok_or_else(|| result.err().unwrap_or(UnicornError(0)))?,
        };
        match stop {
            // With an interrupt controller, the framework waits.
            Stop::Exit(exit, pc) if exit.is_wait_for_interrupt() && machine::has_gic() => {
                state.shared.waiting.store(true, Ordering::SeqCst);
                let interrupted = state.wait();
                state.shared.waiting.store(false, Ordering::SeqCst);
                engine.write(register::PC, if interrupted { pc + 4 } else { pc })?;
            }
            Stop::Exit(exit, pc) => {
                engine.write(register::PC, pc)?;
                return Ok(Ok(Some(exit)));
            }
            Stop::Attention => engine.write(register::PC, pc)?,
            Stop::Interrupt { fiq } => state.take_interrupt(engine, fiq, pc)?,
            Stop::Exception(exception) => state.take_exception(engine, &exception)?,
            Stop::ForgetCode { next } => {
                engine.write(register::PC, next)?;
                self.forget_code()?;
            }
            Stop::OtherRegime { next } => engine.write(register::PC, next)?,
            Stop::ForgetTranslations { next } => {
                engine.write(register::PC, next)?;
                vcpus::forget_translations();
                vcpus::finish_stores();
            }
            Stop::Unsupported(what) => {
                engine.write(register::PC, pc)?;
                eprintln!("fake-hvf: at {pc:#x}: {what} is not emulated");
                return Ok(Err(Code::ERROR));
            }
        }
        Ok(Ok(None))
    }
}

impl Drop for Emulation {
    fn drop(&mut self) {
        // SAFETY: `new` leaked the box, and the engine, whose callbacks use it, runs no more.
        drop(unsafe { Box::from_raw(self.state.as_ptr()) });
    }
}
