package image

import (
	"fmt"
	"strings"

	"github.com/distribution/reference"
)

// name is an image's name, taken apart.
type name struct {
	// tagged is what the runtime is asked for: as the pod has it, with a tag. It
	// is not made fuller than that: short names are the runtime's to resolve.
	tagged string
	// repository and registry are what credentials are looked up by, such as
	// docker.io/library/busybox and docker.io.
	repository, registry string
	// latest is set where the tag is, or has become, latest.
	latest bool
}

func parse(image string) (name, error) {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return name{}, fmt.Errorf("couldn't parse image name %q: %w", image, err)
	}
	n := name{tagged: image, repository: named.Name(), registry: reference.Domain(named)}
	tagged, isTagged := named.(reference.Tagged)
	_, hasDigest := named.(reference.Digested)
	if !isTagged && !hasDigest {
		n.tagged += ":latest"
	}
	n.latest = !hasDigest && (!isTagged || tagged.Tag() == "latest")
	return n, nil
}

// canonical is a name as runtimes list it: with registry and tag, or with the
// digest alone where it has one. What is no name, such as an ID, stays as it is.
func canonical(image string) string {
	if strings.HasPrefix(image, "sha256:") {
		return image
	}
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return image
	}
	return named.String()
}
