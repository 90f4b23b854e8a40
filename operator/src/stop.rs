//! Places where this process can be told to end, so that tests find out what another makes of what it left.
//!
//! `SKEIN_STOP_AT=<place>` ends the process with exit code 86 when it comes to that place for the first time; a note in the lease keeps the next
//! process from doing so again. It is for tests alone, and costs a comparison where it is not set.

use std::{fmt, process, str::FromStr};

use tracing::warn;

use crate::lease::Notes;

/// Exit code of a process that was told to end.
const EXIT: i32 = 86;

/// A place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A revision is written down, and nothing of it is made.
    RevisionRecorded,
    /// Replicas are made, and routers are not told.
    SetsWritten,
    /// It is written down that a replica drains, and routers are not told.
    DrainDecided,
    /// Routers are told.
    StatePushed,
    /// A replica is drained, and nothing of it is deleted.
    BeforeDeletion,
    /// A replica's objects are deleted, and the status does not say so.
    AfterDeletion,
}

/// All of them.
pub const PLACES: [Place; 6] =
    [Place::RevisionRecorded, Place::SetsWritten, Place::DrainDecided, Place::StatePushed, Place::BeforeDeletion, Place::AfterDeletion];

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RevisionRecorded => "revision-recorded",
            Self::SetsWritten => "sets-written",
            Self::DrainDecided => "drain-decided",
            Self::StatePushed => "state-pushed",
            Self::BeforeDeletion => "before-deletion",
            Self::AfterDeletion => "after-deletion",
        })
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || PLACES.map(|p| p.to_string()).join(", ");
        PLACES.into_iter().find(|p| p.to_string() == text).ok_or_else(|| format!("expected one of {}", names()))
    }
}

/// Where this process ends, if anywhere.
#[derive(Default)]
pub struct Stops {
    at: Option<(Place, Notes)>,
    #[cfg(test)]
    watched: watched::Watched,
}

impl Stops {
    /// Ends at `place`, once; that it did is noted in `notes`.
    pub fn at(place: Place, notes: Notes) -> Self {
        Self {
            at: Some((place, notes)),
            #[cfg(test)]
            watched: watched::Watched::default(),
        }
    }

    /// Comes to a place.
    pub async fn pass(&self, place: Place) {
        #[cfg(test)]
        self.watched.pass(place).await;
        let Some((_, notes)) = self.at.as_ref().filter(|(at, _)| *at == place) else { return };
        match notes.first(&place.to_string()).await {
            Ok(true) => {
                warn!(%place, "this process was told to end here");
                process::exit(EXIT);
            }
            Ok(false) => {}
            Err(error) => warn!(%place, %error, "the place to end at cannot be noted, so nothing ends"),
        }
    }
}

/// Tests in this crate see where a reconcile was, and stop it there.
#[cfg(test)]
pub(crate) mod watched {
    use std::{
        future::pending,
        sync::{Arc, Mutex},
    };

    use super::{Place, Stops};

    /// Places that were passed; one that is never left.
    #[derive(Default)]
    pub(super) struct Watched {
        passed: Arc<Mutex<Vec<Place>>>,
        halt: Option<Place>,
    }

    impl Watched {
        pub(super) async fn pass(&self, place: Place) {
            self.passed.lock().expect("nobody panics with it").push(place);
            if self.halt == Some(place) {
                pending::<()>().await;
            }
        }
    }

    impl Stops {
        /// Notes places in `passed`, and never leaves `halt`.
        pub(crate) fn watched(passed: Arc<Mutex<Vec<Place>>>, halt: Option<Place>) -> Self {
            Self { at: None, watched: Watched { passed, halt } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_have_names() {
        for place in PLACES {
            assert_eq!(place.to_string().parse(), Ok(place));
        }
        assert!("elsewhere".parse::<Place>().expect_err("no place").contains("sets-written"));
    }
}
