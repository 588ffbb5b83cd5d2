// Command registry serves an OCI image layout over HTTP, read only, for critest's specs
// that pull: registry LAYOUT ADDRESS. An image answers to the path and tag of the name
// that its annotation io.containerd.image.name gives, whatever the registry's host.
package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Annotations map[string]string `json:"annotations"`
}

var digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: registry LAYOUT ADDRESS")
	}
	layout, address := os.Args[1], os.Args[2]
	manifests, err := read(layout)
	if err != nil {
		log.Fatalf("cannot read the image layout in %s: %v", layout, err)
	}
	http.HandleFunc("/v2/", func(w http.ResponseWriter, r *http.Request) {
		path := strings.TrimPrefix(r.URL.Path, "/v2/")
		if path == "" {
			return
		}
		digest, mediaType := find(path, manifests)
		if !digestForm.MatchString(digest) {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", mediaType)
		w.Header().Set("Docker-Content-Digest", digest)
		http.ServeFile(w, r, filepath.Join(layout, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:")))
	})
	server := http.Server{Addr: address, ReadHeaderTimeout: 10 * time.Second}
	log.Fatal(server.ListenAndServe())
}

// read returns a layout's manifests by "path:tag" and by digest.
func read(layout string) (map[string]descriptor, error) {
	content, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		return nil, err
	}
	var index struct {
		Manifests []descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(content, &index); err != nil {
		return nil, err
	}
	manifests := map[string]descriptor{}
	for _, manifest := range index.Manifests {
		_, name, _ := strings.Cut(manifest.Annotations["io.containerd.image.name"], "/")
		manifests[name] = manifest
		manifests[manifest.Digest] = manifest
	}
	return manifests, nil
}

// find returns the digest and the media type of what a path below /v2/ names.
func find(path string, manifests map[string]descriptor) (digest, mediaType string) {
	if _, blob, ok := strings.Cut(path, "/blobs/"); ok {
		return blob, "application/octet-stream"
	}
	name, reference, _ := strings.Cut(path, "/manifests/")
	manifest, ok := manifests[reference]
	if !ok {
		manifest = manifests[name+":"+reference]
	}
	return manifest.Digest, manifest.MediaType
}
