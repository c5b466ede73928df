//! `.pgpass`: one password a line, by host, port, database and user (manual: "The Password File").

use std::path::Path;

/// Whether nobody else can read the file; others are not used, as with libpq.
pub fn is_private(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o077 == 0)
}

/// The password of the first line that fits host, port, database and user.
pub fn lookup(text: &str, wanted: &[&str; 4]) -> Option<String> {
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let mut fields = vec![String::new()];
        let mut chars = line.chars();
        while let Some(c) = chars.next() {
            match c {
                '\\' => fields.last_mut()?.extend(chars.next()),
                ':' if fields.len() < 5 => fields.push(String::new()),
                c => fields.last_mut()?.push(c),
            }
        }
        if fields.len() == 5
            && fields
                .iter()
                .zip(wanted)
                .all(|(field, want)| field == "*" || field == want)
        {
            return fields.pop();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passfile_lines() {
        let text = "# c\nh:5432:*:u:p1\n*:*:*:*:p\\:2\n";
        assert_eq!(lookup(text, &["h", "5432", "d", "u"]).as_deref(), Some("p1"));
        assert_eq!(lookup(text, &["x", "1", "d", "u"]).as_deref(), Some("p:2"));
    }
}
