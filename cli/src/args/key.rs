//! Options of the verbs of `key`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Verbs of `key`.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a new key file (mode 0600); it is needed for every restore
    Generate {
        /// The new file
        file: PathBuf,
    },
    /// List the slots that open a stanza
    List {
        /// Stanza
        stanza: String,
    },
    /// Does the configured key open everything that the repository holds?
    Check {
        /// Stanza
        stanza: String,
    },
    /// Write the stanza's key slots into a file, for a safe or on paper: together with a key or passphrase they open it
    Export {
        /// Stanza
        stanza: String,
        /// The new file (mode 0600)
        file: PathBuf,
    },
    /// Bring key slots back that were lost in the repository
    Import {
        /// Stanza
        stanza: String,
        /// What `key export` has written
        file: PathBuf,
    },
    /// Add a slot, so that another key or passphrase opens the stanza too
    AddSlot {
        /// Stanza
        stanza: String,
        /// Name of the slot
        name: String,
        /// File with the other key or passphrase
        #[arg(long, value_name = "FILE")]
        secret_file: PathBuf,
        /// It backs up and archives, and reads nothing of what was stored: for a database host
        #[arg(long)]
        write_only: bool,
        /// It expires and collects as the operator's key does, and reads nothing of what was stored
        #[arg(long, conflicts_with = "write_only")]
        no_content: bool,
    },
    /// Remove a slot: what it opened so far, whoever has copied it can still open
    RemoveSlot {
        /// Stanza
        stanza: String,
        /// Name of the slot
        name: String,
    },
    /// Begin a new key epoch: what comes is sealed with new keys, and what is there stays readable
    Rotate(RotateArgs),
    /// Destroy all key slots of a stanza: nothing in it can be read ever again
    Erase(EraseArgs),
}

/// `key rotate`
#[derive(Debug, Args)]
pub struct RotateArgs {
    /// Stanza
    pub stanza: String,
    /// File with another key or passphrase, which opens everything from now on; the configured one does not open what comes
    #[arg(long, value_name = "FILE")]
    pub new_secret_file: Option<PathBuf>,
    /// Name of its slots [default: as there are already, else key and the number of the new epoch]
    #[arg(long, value_name = "NAME", requires = "new_secret_file")]
    pub slot: Option<String>,
    /// Go on although slots of other secrets do not open what comes
    #[arg(long)]
    pub drop_slots: bool,
    /// Content is sealed to a public key from now on, so that hosts can have a key that writes only; later rotations keep that.
    /// Where it was not so before, this needs --new-secret-file: the database host has had the old secret
    #[arg(long)]
    pub public_key: bool,
}

/// `key erase`
#[derive(Debug, Args)]
pub struct EraseArgs {
    /// Stanza
    pub stanza: String,
    /// The stanza's name once more: this is not undone
    #[arg(long, value_name = "STANZA")]
    pub confirm: String,
    /// Why, for the log
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub reason: String,
}
