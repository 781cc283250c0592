#!/usr/bin/env bash
# Start a local Orthanc with DICOMweb, to try ASLseg with OHIF:
#   bash scripts/orthanc.sh [FOLDER] [HTTP_PORT] [DICOM_PORT]
# FOLDER keeps its database and index (default: .orthanc). Stop it with Ctrl-C.
# Debian/Ubuntu: apt-get install orthanc orthanc-dicomweb
set -euo pipefail

folder=$(realpath -m "${1:-.orthanc}")
http=${2:-8042}
dicom=${3:-4242}

binary=$(PATH="$PATH:/usr/sbin" command -v Orthanc) || {
  echo "Orthanc is not installed; apt-get install orthanc orthanc-dicomweb" >&2
  exit 1
}
plugin=$(find /usr/share/orthanc/plugins /usr/lib/orthanc -name 'libOrthancDicomWeb.so*' 2>/dev/null | head -n 1)
[ -n "$plugin" ] || {
  echo "Orthanc has no DICOMweb plugin; apt-get install orthanc-dicomweb" >&2
  exit 1
}

mkdir -p "$folder"
cat > "$folder/orthanc.json" <<JSON
{
  "Name": "ASLseg",
  "StorageDirectory": "$folder/db",
  "IndexDirectory": "$folder/db",
  "Plugins": ["$plugin"],
  "HttpServerEnabled": true,
  "HttpPort": $http,
  "DicomPort": $dicom,
  "RemoteAccessAllowed": false,
  "AuthenticationEnabled": false,
  "DicomWeb": {"Enable": true, "Root": "/dicom-web/", "EnableWado": true}
}
JSON
cat <<TEXT
Orthanc on http://127.0.0.1:$http (upload DICOM there, or:
  for f in FOLDER/*.dcm; do curl -sS -X POST http://127.0.0.1:$http/instances --data-binary @"\$f" >/dev/null; done)
Then:  bash scripts/start.sh --studies http://127.0.0.1:$http/dicom-web
and open http://127.0.0.1:8000/ohif/
TEXT
exec "$binary" "$folder/orthanc.json"
