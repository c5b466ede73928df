//! Ceph's radosgw on one port of this machine, from Debian's packages unpacked into a folder: a second,
//! independent S3 implementation, which enforces locks.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::s3::free_port;
use crate::{Scratch, run, tools};

/// Credentials of the user who owns the buckets.
pub const ACCESS_KEY: &str = "test";
/// Its secret, and that of the others.
pub const SECRET_KEY: &str = "testsecret";

const PACKAGES: [&str; 5] = ["radosgw", "ceph-mon", "ceph-osd", "ceph-base", "ceph-common"];

fn root() -> PathBuf {
    tools::folder().join("ceph/root")
}

/// Downloads and unpacks the packages that this machine does not have.
pub fn install() -> Result<()> {
    let folder = tools::folder().join("ceph");
    if folder.join(".complete").exists() {
        return Ok(());
    }
    eprintln!("unpacking Ceph's radosgw from Debian (about 70 MB)");
    let _ = std::fs::remove_dir_all(&folder);
    let debs = folder.join("debs");
    std::fs::create_dir_all(&debs)?;
    std::fs::create_dir_all(root())?;
    // Others have what lists there are.
    if tools::is_root() {
        run(Command::new("apt-get").args(["update", "-q"]))?;
    }
    let needed = run(Command::new("apt-cache")
        .args([
            "depends",
            "--recurse",
            "--no-recommends",
            "--no-suggests",
            "--no-conflicts",
        ])
        .args(["--no-breaks", "--no-replaces", "--no-enhances"])
        .args(["radosgw", "ceph-mon", "ceph-osd", "ceph-common"]))?;
    let have = run(Command::new("dpkg-query").args(["-W", "-f", "${Package}\n"]))?;
    let have: std::collections::BTreeSet<&str> = have.lines().collect();
    let mut wanted: Vec<&str> = needed
        .lines()
        .filter(|l| l.starts_with(|c: char| c.is_ascii_alphanumeric()))
        .filter(|l| !have.contains(l))
        .collect();
    wanted.sort_unstable();
    wanted.dedup();
    let download = |packages: &[&str]| {
        run(Command::new("apt-get")
            .args(["download", "-q"])
            .args(packages)
            .current_dir(&debs))
    };
    // All at once takes seconds, and one by one a minute.
    if download(&wanted).is_err() {
        for package in wanted {
            // Virtual packages cannot be downloaded, and what matters is checked below.
            let _ = download(&[package]);
        }
    }
    for entry in std::fs::read_dir(&debs)? {
        run(Command::new("dpkg").arg("-x").arg(entry?.path()).arg(root()))?;
    }
    for package in PACKAGES {
        let prefix = format!("{package}_");
        let found = std::fs::read_dir(&debs)?
            .flatten()
            .any(|e| e.file_name().to_string_lossy().starts_with(&prefix));
        if !found && !have.contains(package) {
            bail!("the Debian package {package} could not be downloaded");
        }
    }
    std::fs::remove_dir_all(&debs)?;
    std::fs::write(folder.join(".complete"), "")?;
    Ok(())
}

/// A running cluster of one monitor, one OSD in memory and one gateway; it ends with this value.
#[derive(Debug)]
pub struct Rgw {
    daemons: Vec<Child>,
    folder: PathBuf,
    port: u16,
}

impl Rgw {
    /// Starts it.
    pub fn start(scratch: &Scratch) -> Result<Self> {
        install()?;
        let folder = scratch.join("ceph");
        for name in ["mon", "osd/0", "mgr", "log", "run"] {
            std::fs::create_dir_all(folder.join(name))?;
        }
        let mut this = Self {
            daemons: Vec::new(),
            port: free_port()?,
            folder,
        };
        let (mon, cluster, osd) = (free_port()?, uuid()?, uuid()?);
        std::fs::write(this.folder.join("ceph.conf"), this.configuration(mon, &cluster))?;
        let map = this.folder.join("monmap");
        run(this
            .program("monmaptool")
            .args(["--create", "--fsid", &cluster, "--addv", "a"])
            .arg(format!("[v2:127.0.0.1:{mon}]"))
            .arg(&map))?;
        run(this
            .program("ceph-mon")
            .args(["--mkfs", "-i", "a", "--monmap"])
            .arg(&map))?;
        this.daemon("ceph-mon", &["-i", "a", "-f"])?;
        this.retry("the monitor", |this| {
            run(this
                .program_by("/usr/bin/python3")
                .arg(root().join("usr/bin/ceph"))
                .args(["--connect-timeout", "5", "osd", "new", &osd]))
        })?;
        std::fs::write(this.folder.join("osd/0/fsid"), format!("{osd}\n"))?;
        run(this.program("ceph-osd").args(["-i", "0", "--mkfs", "--osd-uuid", &osd]))?;
        this.daemon("ceph-osd", &["-i", "0", "-f"])?;
        this.retry("the OSD", |this| {
            run(this
                .program_by("timeout")
                .arg("20")
                .arg(root().join("usr/bin/radosgw-admin"))
                .args(["user", "create", "--uid=t", "--display-name=t"])
                .arg(format!("--access-key={ACCESS_KEY}"))
                .arg(format!("--secret-key={SECRET_KEY}")))
        })?;
        let front = format!("beast endpoint=127.0.0.1:{}", this.port);
        this.daemon(
            "radosgw",
            &[
                "-n",
                "client.admin",
                "-f",
                "--ms_mon_client_mode",
                "crc secure",
                "--rgw_frontends",
                &front,
            ],
        )?;
        this.retry("the gateway", |this| {
            run(Command::new("curl").args(["-s", "-m", "1", "-o", "/dev/null", &this.endpoint()]))
        })?;
        Ok(this)
    }

    /// Its URL.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Makes a bucket.
    pub fn bucket(&self, name: &str) -> Result<()> {
        signed_put(SECRET_KEY, &format!("{}/{name}", self.endpoint()), &[]).map(drop)
    }

    /// Makes another user, whose access key is its name, with the same secret. It may do nothing yet.
    pub fn add_user(&self, name: &str) -> Result<()> {
        run(self
            .program_by("timeout")
            .arg("60")
            .arg(root().join("usr/bin/radosgw-admin"))
            .args(["user", "create"])
            .arg(format!("--uid={name}"))
            .arg(format!("--display-name={name}"))
            .arg(format!("--access-key={name}"))
            .arg(format!("--secret-key={SECRET_KEY}")))?;
        Ok(())
    }

    /// Sets the policy of a bucket.
    pub fn set_policy(&self, bucket: &str, policy: &str) -> Result<()> {
        let url = format!("{}/{bucket}?policy=", self.endpoint());
        let more = ["-H", "Content-Type: application/json", "--data-binary", policy];
        signed_put(SECRET_KEY, &url, &more).map(drop)
    }

    fn retry(&self, what: &str, attempt: impl Fn(&Self) -> Result<String>) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            match attempt(self) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error)
                        .with_context(|| format!("{what} did not come up: see {}", self.folder.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(500)),
            }
        }
    }

    fn program(&self, name: &str) -> Command {
        self.program_by(root().join("usr/bin").join(name))
    }

    fn program_by(&self, program: impl AsRef<Path>) -> Command {
        let lib = root().join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(program.as_ref());
        command
            .env(
                "LD_LIBRARY_PATH",
                format!(
                    "{0}:{0}/ceph:{1}",
                    lib.display(),
                    root().join("lib/x86_64-linux-gnu").display()
                ),
            )
            .env("PYTHONPATH", root().join("usr/lib/python3/dist-packages"))
            .env("CEPH_CONF", self.folder.join("ceph.conf"));
        command
    }

    fn daemon(&mut self, name: &str, arguments: &[&str]) -> Result<()> {
        let log = std::fs::File::create(self.folder.join(format!("log/{name}.out")))?;
        let child = self
            .program(name)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.daemons.push(child);
        Ok(())
    }

    fn configuration(&self, mon: u16, cluster: &str) -> String {
        let (dir, lib) = (self.folder.display(), root().join("usr/lib/x86_64-linux-gnu"));
        let lib = lib.display();
        format!(
            "[global]\nfsid = {cluster}\nmon_host = v2:127.0.0.1:{mon}/0\nmon_initial_members = a\n\
             ms_bind_ipv4 = true\npublic_addr = 127.0.0.1\ncluster_addr = 127.0.0.1\n\
             auth_cluster_required = none\nauth_service_required = none\nauth_client_required = none\n\
             osd_pool_default_size = 1\nosd_pool_default_min_size = 1\nmon_allow_pool_size_one = true\n\
             osd_crush_chooseleaf_type = 0\nosd_pool_default_pg_num = 4\nosd_pool_default_pgp_num = 4\n\
             mon_max_pg_per_osd = 2000\nplugin_dir = {lib}/ceph\nerasure_code_dir = {lib}/ceph/erasure-code\n\
             osd_class_dir = {lib}/rados-classes\nrun_dir = {dir}/run\n\
             admin_socket = {dir}/run/$cluster-$name.$pid.asok\nlog_file = {dir}/log/$name.log\n\
             log_to_syslog = false\npid_file = {dir}/run/$name.pid\nauth_allow_insecure_global_id_reclaim = true\n\
             mon_data = {dir}/mon\nosd_data = {dir}/osd/$id\nosd_objectstore = memstore\n\
             memstore_device_bytes = 1073741824\nmon_data_avail_crit = 1\nmgr_data = {dir}/mgr\n\
             rgw_thread_pool_size = 32\nrgw_dns_name = localhost\n"
        )
    }
}

fn uuid() -> Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/uuid")?
        .trim()
        .to_owned())
}

impl Drop for Rgw {
    fn drop(&mut self) {
        // An OSD takes minutes to end politely.
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// A signed PUT about a bucket, of this server or another one that knows the access key.
pub fn signed_put(secret: &str, url: &str, more: &[&str]) -> Result<String> {
    run(Command::new("curl")
        .args([
            "-sS",
            "--fail-with-body",
            "-X",
            "PUT",
            "-H",
            "x-amz-content-sha256: UNSIGNED-PAYLOAD",
        ])
        .args(["--aws-sigv4", "aws:amz:us-east-1:s3", "--user"])
        .arg(format!("{ACCESS_KEY}:{secret}"))
        .args(more)
        .arg(url))
}
