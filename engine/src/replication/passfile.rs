//! `.pgpass`: one password a line, by host, port, database and user (manual: "The Password File").

use std::path::Path;

use zeroize::Zeroizing;

/// Whether nobody else can read the file; others are not used, as with libpq.
pub fn is_private(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o077 == 0)
}

/// The password of the first line that fits host, port, database and user.
pub fn lookup(text: &str, wanted: &[&str; 4]) -> Option<Zeroizing<String>> {
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        // One that grows leaves parts of itself behind.
        let field = || Zeroizing::new(String::with_capacity(line.len()));
        let mut fields = vec![field()];
        let mut chars = line.chars();
        while let Some(c) = chars.next() {
            match c {
                '\\' => fields.last_mut()?.extend(chars.next()),
                ':' if fields.len() < 5 => fields.push(field()),
                c => fields.last_mut()?.push(c),
            }
        }
        if fields.len() == 5
            && fields
                .iter()
                .zip(wanted)
                .all(|(field, want)| [*want, "*"].contains(&field.as_str()))
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
        let password = |wanted: &[&str; 4]| lookup(text, wanted).map(|password| password.to_string());
        assert_eq!(password(&["h", "5432", "d", "u"]).as_deref(), Some("p1"));
        assert_eq!(password(&["x", "1", "d", "u"]).as_deref(), Some("p:2"));
    }
}
