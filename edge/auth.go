package edge

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
)

// mapperToken reads the mappers' token from the data folder; the first start
// makes it.
func mapperToken(dir string) (string, error) {
	path := filepath.Join(dir, "mapper.token")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		var raw [32]byte
		_, _ = rand.Read(raw[:]) // never fails
		t := base64.RawURLEncoding.EncodeToString(raw[:])
		return t, writeFile(path, []byte(t))
	}
	if err != nil {
		return "", fmt.Errorf("mapper token: %w", err)
	}
	t := strings.TrimSpace(string(b))
	if len(t) < 32 || !printable(t) {
		return "", fmt.Errorf("mapper token %s is damaged: remove it, and the next start makes a new one", path)
	}
	return t, nil
}

// printable tells whether a token is one word that can be written down; what a
// power cut leaves of a file is not.
func printable(token string) bool {
	for i := range len(token) {
		if token[i] <= ' ' || token[i] > '~' {
			return false
		}
	}
	return true
}

// authenticate tells who a client of the node's own bus is: with the mappers'
// token a mapper, from this host without any name a local client, otherwise nobody.
func authenticate(mapperToken string) func(broker.ConnectInfo) (access.Identity, error) {
	return func(ci broker.ConnectInfo) (access.Identity, error) {
		if name, ok := strings.CutPrefix(ci.Username, "mapper:"); ok || ci.Username == "mapper" {
			if subtle.ConstantTimeCompare(ci.Password, []byte(mapperToken)) != 1 {
				return access.Identity{}, errors.New("wrong mapper token: it is in mapper.token in the agent's data folder")
			}
			return access.Identity{Role: access.Mapper, Name: name}, nil
		}
		if ci.Username != "" || len(ci.Password) > 0 {
			return access.Identity{}, fmt.Errorf("unknown user %q: local clients connect without a name, mappers as mapper:<name> with the mapper token", ci.Username)
		}
		if !ci.Loopback {
			return access.Identity{}, errors.New("clients from the network need a credential; from the node's own host none is needed")
		}
		return access.Identity{Role: access.Local}, nil
	}
}
