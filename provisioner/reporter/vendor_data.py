"""Renders the vendor data that installs the reporter on a freshly deployed host.

A script and not a `#cloud-config`: cloud-init lets a key of the user's data replace the same
key of the vendor's, so one `runcmd` in a profile would take the reporter away in silence.
"""

import base64
import json
from pathlib import Path
from typing import Final

_UNIT: Final = """\
[Unit]
Description=Report a finished deployment to the provisioner
# After the last stage of cloud-init: what it reports is a system that is up.
After=cloud-final.service network-online.target
Wants=network-online.target
ConditionPathExists=/etc/provisioner/reporter.json

[Service]
# Not oneshot: whatever waits for cloud-init.target would wait for the end of the soak, and a
# health check may ask for just that.
Type=exec
ExecStart=/usr/bin/python3 -I -S /var/lib/provisioner/reporter.py
Restart=on-failure
RestartSec=60
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
ReadWritePaths=/etc/provisioner

[Install]
# Not multi-user.target: cloud-final comes after that, and so the two would wait for each other.
WantedBy=cloud-init.target
"""

# Not below /usr: what lies there is the release's, and is watched for drift.
_SCRIPT: Final = """\
#!/bin/sh
# Installs the provisioner's reporter. Runs once for each deployment, as root.
set -eu
umask 077
put() {{
    base64 -d > "$1.new"
    chmod "$2" "$1.new"
    mv "$1.new" "$1"
}}
for folder in /etc/provisioner /var/lib/provisioner; do
    mkdir -p "$folder"
    chmod 0755 "$folder"
done
put /etc/provisioner/reporter.json 0600 << 'END'
{config}
END
put /var/lib/provisioner/reporter.py 0644 << 'END'
{reporter}
END
put /etc/systemd/system/provisioner-reporter.service 0644 << 'END'
{unit}
END
# What `systemctl enable` would link, without its reload of every unit, which costs seconds
# on a slow host. A unit that systemd has not seen before is read when it is started.
mkdir -p /etc/systemd/system/cloud-init.target.wants
ln -sf ../provisioner-reporter.service /etc/systemd/system/cloud-init.target.wants/
# It waits for this very stage of cloud-init to end; waiting for it here would never end.
systemctl start --no-block provisioner-reporter.service
"""


def vendor_data(url: str, nonce: str, ca_pem: str) -> str:
    """Return the vendor data for one deployment.

    url is where the agent listener is reached, ca_pem the certificate to pin for it. The
    nonce makes this text a secret: it goes into the seed and nowhere else.
    """
    config = json.dumps({"url": url, "nonce": nonce, "ca_pem": ca_pem})
    reporter = Path(__file__).with_name("reporter.py").read_text(encoding="utf-8")
    return _SCRIPT.format(config=_packed(config), reporter=_packed(reporter), unit=_packed(_UNIT))


def _packed(text: str) -> str:
    return base64.encodebytes(text.encode()).decode("ascii").strip()
