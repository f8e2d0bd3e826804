//! The copier: one thread that moves rows between frames and device blocks beside the compute.
//!
//! Loads go first, oldest first, all blocks of a layer before the next layer. A save's row goes as
//! soon as the compute thread has produced its layer. Each load and save has a [`Gate`]: compute
//! waits at a load's gate before it reads the blocks, and at a save's before it overwrites one.
//!
//! ```text
//! engine: load ──► queue ─► layer 0 ─► layer 1 ─► …   gate opens after each; CRC32C of each row
//! engine: save ──► queue ─► (computed 0?) row 0 ─► …  gate opens after each; checksums go back
//! ```

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use kernels::paged_attention::KvBlocks;

use super::gate::Gate;
use crate::batch::{BackendEvent, LoadBlock, LoadId, LoadPlan, SavePlan, StepId};

/// Sees what the backend does, and may hold it back: how tests prove the order of things.
pub trait Probe: Send + Sync {
    /// The copier is about to copy a layer of a load.
    fn before_load_layer(&self, load: LoadId, layer: usize) {
        let _ = (load, layer);
    }
    /// The compute thread is about to wait for the layer's loads, with the layer's new K and V in hand.
    fn waits_for_loads(&self, step: StepId, layer: usize) {
        let _ = (step, layer);
    }
    /// The compute thread has finished a layer of a step.
    fn computed_layer(&self, step: StepId, layer: usize) {
        let _ = (step, layer);
    }
}

/// Sees nothing.
pub struct NoProbe;
impl Probe for NoProbe {}

/// How far the compute thread has come: all steps below `step`, and `layers` of that step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Computed {
    /// Step in work, or next.
    pub step: u64,
    /// Its finished layers.
    pub layers: usize,
}

enum Command {
    Load(LoadPlan, Arc<Gate>),
    /// The save, and the first step that it does not wait for.
    Save(SavePlan, u64, Arc<Gate>),
}

#[derive(Default)]
struct State {
    commands: VecDeque<Command>, // Bounded by the engine: a load a sequence, a save a block.
    computed: Computed,
    saves_wait: bool,
    stop: bool,
}

/// What engine, compute thread and copier share.
#[derive(Default)]
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, command: Command) {
        self.lock().commands.push_back(command);
        self.changed.notify_one();
    }

    /// Starts a load.
    pub fn load(&self, plan: LoadPlan, gate: Arc<Gate>) {
        self.push(Command::Load(plan, gate));
    }

    /// Starts a save behind all steps below `after`.
    pub fn save(&self, plan: SavePlan, after: u64, gate: Arc<Gate>) {
        self.push(Command::Save(plan, after, gate));
    }

    /// The compute thread has come this far.
    pub fn computed(&self, computed: Computed) {
        let mut state = self.lock();
        state.computed = computed;
        if state.saves_wait {
            drop(state);
            self.changed.notify_one();
        }
    }

    /// The thread ends after the row in its hands.
    pub fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_one();
    }
}

struct Load {
    plan: LoadPlan,
    gate: Arc<Gate>,
    row: usize,
    checksums: Vec<Vec<u32>>, // Of each block's rows, from the first row on.
}

struct Save {
    plan: SavePlan,
    gate: Arc<Gate>,
    after: u64,
    checksums: Vec<u32>, // Of the rows saved so far.
}

impl Save {
    fn layer(&self) -> usize {
        usize::from(self.plan.present_layers[self.checksums.len()])
    }

    fn is_ready(&self, computed: Computed) -> bool {
        // Layer l of step after - 1 is done, or a later step runs.
        (Computed { step: self.after, layers: 0 }) <= computed
            || (Computed { step: self.after - 1, layers: self.layer() + 1 }) <= computed
    }
}

/// The thread's state.
pub struct Copier {
    pub queue: Arc<Queue>,
    pub blocks: Arc<KvBlocks>,
    pub layers: usize,
    pub events: Sender<BackendEvent>,
    pub wake: Arc<dyn Fn() + Send + Sync>,
    pub probe: Arc<dyn Probe>,
}

impl Copier {
    /// Runs until [`Queue::stop`].
    pub fn run(self) {
        let mut loads: VecDeque<Load> = VecDeque::new();
        let mut saves: VecDeque<Save> = VecDeque::new();
        loop {
            let mut state = self.queue.lock();
            let ready = loop {
                if state.stop {
                    return;
                }
                for command in state.commands.drain(..) {
                    match command {
                        Command::Load(plan, gate) => {
                            loads.push_back(Load { plan, gate, row: 0, checksums: Vec::new() });
                        }
                        Command::Save(plan, after, gate) => {
                            saves.push_back(Save { plan, gate, after, checksums: Vec::new() });
                        }
                    }
                }
                let computed = state.computed;
                let ready = saves.iter().position(|save| save.is_ready(computed));
                if !loads.is_empty() || ready.is_some() {
                    break ready;
                }
                state.saves_wait = !saves.is_empty();
                state = self.queue.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            state.saves_wait = false;
            drop(state);
            if let Some(load) = loads.front_mut() {
                if self.copy_layer(load) {
                    loads.pop_front();
                }
            } else if let Some(index) = ready
                && self.save_row(&mut saves[index])
            {
                saves.remove(index);
            }
        }
    }

    fn tell(&self, event: BackendEvent) {
        // A closed channel means that the backend is being dropped.
        drop(self.events.send(event));
        (self.wake)();
    }

    /// Copies one layer of all blocks; true when the load is over.
    fn copy_layer(&self, load: &mut Load) -> bool {
        let plan = &load.plan;
        let rows = plan.present_layers.len();
        let layer = plan.present_layers.get(load.row).map_or(self.layers, |&layer| layer.into());
        let fail = |block: &LoadBlock| {
            block.frame.reject();
            load.gate.fail();
            self.tell(BackendEvent::LoadFailed(plan.id));
            true
        };
        if load.row == 0 {
            load.gate.open_to(layer); // Layers that no frame holds are not waited for.
            for block in &plan.blocks {
                let Some(checksums) = block.frame.checksums() else { return fail(block) };
                load.checksums.push(checksums);
            }
        }
        if load.row == rows {
            self.tell(BackendEvent::Loaded(plan.id));
            return true;
        }
        self.probe.before_load_layer(plan.id, layer);
        for (block, checksums) in plan.blocks.iter().zip(&load.checksums) {
            // SAFETY: rows that wait for this load do not touch its blocks before the gate opens,
            // and nobody else names them (contract of `Backend::load` in batch.rs).
            let row = unsafe { self.blocks.row_mut(layer, block.block.0 as usize) };
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(row);
            block.frame.read(load.row * bytes.len(), bytes);
            if checksums.get(load.row) != Some(&crc32c::crc32c(bytes)) {
                return fail(block);
            }
        }
        load.row += 1;
        let next = plan.present_layers.get(load.row).map_or(self.layers, |&layer| layer.into());
        load.gate.open_to(next);
        if load.row == rows {
            self.tell(BackendEvent::Loaded(plan.id));
        }
        load.row == rows
    }

    /// Copies one layer of a block; true when the save is over.
    fn save_row(&self, save: &mut Save) -> bool {
        let Save { plan, gate, checksums, .. } = save;
        let rows = plan.present_layers.len();
        if checksums.len() < rows {
            let layer = usize::from(plan.present_layers[checksums.len()]);
            // SAFETY: the steps that produce this row are past it, and later steps wait at this
            // save's gate before they write to the block.
            let row = unsafe { self.blocks.row(layer, plan.block.0 as usize) };
            let bytes: &[u8] = bytemuck::cast_slice(row);
            plan.frame.write(checksums.len() * bytes.len(), bytes);
            checksums.push(crc32c::crc32c(bytes));
            let next = plan.present_layers.get(checksums.len());
            gate.open_to(next.map_or(self.layers, |&layer| layer.into()));
        }
        if checksums.len() < rows {
            return false;
        }
        self.tell(BackendEvent::Saved(plan.id, checksums.as_slice().into()));
        true
    }
}
