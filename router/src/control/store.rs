//! The fleet state in force, and the file that keeps it.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use plan::fleet::FleetState;
use tokio::sync::watch;
use tracing::info;

use super::ControlError;

/// The fleet state in force: whoever learns of a later one puts it here, and it is kept on a file for the next process. A cheap clone.
#[derive(Clone, Debug)]
pub struct FleetStore {
    state: watch::Sender<FleetState>,
    kept: Option<Arc<Kept>>,
}

#[derive(Debug)]
struct Kept {
    path: PathBuf,
    /// Held while the file is written.
    writing: Mutex<()>,
}

impl FleetStore {
    /// Begins with `state`; later ones are kept in the file `kept`.
    pub fn new(state: FleetState, kept: Option<PathBuf>) -> Self {
        let kept = kept.map(|path| Arc::new(Kept { path, writing: Mutex::new(()) }));
        Self { state: watch::Sender::new(state), kept }
    }

    /// The state that the last process kept in the file at `path`; `None` when there is none.
    ///
    /// # Errors
    /// When the file cannot be read, or holds something else.
    pub fn read(path: &Path) -> Result<Option<FleetState>, ControlError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ControlError::File { action: "read", path: path.to_owned(), source }),
        };
        serde_json::from_slice(&text).map(Some).map_err(|source| ControlError::Damaged { path: path.to_owned(), source })
    }

    /// Follows what is in force.
    pub fn subscribe(&self) -> watch::Receiver<FleetState> {
        self.state.subscribe()
    }

    /// Term and number of the state in force.
    pub fn number(&self) -> (u64, u64) {
        number(&self.state.borrow())
    }

    /// The state in force.
    pub(crate) fn current(&self) -> FleetState {
        self.state.borrow().clone()
    }

    /// Puts a state in force, then keeps it; one that is not later than what is in force changes nothing (`false`).
    ///
    /// # Errors
    /// When it cannot be written. It is in force regardless.
    pub async fn take(&self, state: FleetState) -> Result<bool, ControlError> {
        let ((term, number_), deployments) = (number(&state), state.deployments.len());
        let later = self.state.send_if_modified(|in_force| {
            let later = number(&state) > number(in_force);
            if later {
                *in_force = state;
            }
            later
        });
        if !later {
            info!(term, number = number_, "ignored a state that is not later");
            return Ok(false);
        }
        info!(term, number = number_, deployments, "took a fleet state");
        let Some(kept) = self.kept.clone() else { return Ok(true) };
        let failed = |source| ControlError::File { action: "write", path: kept.path.clone(), source };
        let (writer, states) = (kept.clone(), self.state.clone());
        let written = tokio::task::spawn_blocking(move || {
            let _one = writer.writing.lock().unwrap_or_else(PoisonError::into_inner);
            let text = serde_json::to_vec(&*states.borrow()).map_err(io::Error::other)?;
            keep(&writer.path, &text)
        });
        written.await.map_err(io::Error::other).and_then(|kept| kept).map_err(failed)?;
        Ok(true)
    }
}

/// Writes a file whole or not at all.
fn keep(path: &Path, text: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

fn number(state: &FleetState) -> (u64, u64) {
    (state.term, state.number)
}
