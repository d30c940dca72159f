package image

import (
	"crypto/sha256"
	"maps"
	"slices"
)

// maxAccess is how many secrets are remembered for an image; beyond it, pods with
// others have to pull it to use it.
const maxAccess = 100

// access says with what an image was pulled from a repository.
type access struct {
	anyone  bool // without a secret: every pod of the node can
	secrets map[secretRef][sha256.Size]byte
}

// intent is the running pulls of an image: what they bring is not preloaded,
// although it is there before they have ended.
type intent struct {
	pulls  int
	before string // the ID that was there when the first of them began
}

// intend notes a pull until done is called.
func (m *Images) intend(image, before string) (done func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	in := m.mu.pulling[image]
	if in == nil {
		in = &intent{before: before}
		m.mu.pulling[image] = in
	}
	in.pulls++
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if in.pulls--; in.pulls == 0 {
			delete(m.mu.pulling, image)
		}
	}
}

// allow notes that a pull worked.
func (m *Images) allow(id, repository string, used *credential) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.access[id] == nil {
		m.mu.access[id] = map[string]*access{}
	}
	a := m.mu.access[id][repository]
	if a == nil {
		a = &access{secrets: map[secretRef][sha256.Size]byte{}}
		m.mu.access[id][repository] = a
	}
	switch {
	case used == nil || used.from == nil:
		a.anyone, a.secrets = true, nil
	case !a.anyone:
		a.note(used)
	}
}

func (a *access) note(c *credential) {
	if _, known := a.secrets[*c.from]; known || len(a.secrets) < maxAccess {
		a.secrets[*c.from] = c.hash()
	}
}

// mayUse tells whether a pod may use an image that is present without pulling it.
func (m *Images) mayUse(id string, r *request) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	repositories, pulled := m.mu.access[id]
	if !pulled {
		in := m.mu.pulling[r.container.Image]
		return in == nil || in.before == id // preloaded
	}
	a := repositories[r.name.repository]
	if a == nil {
		return false
	}
	if a.anyone {
		return true
	}
	for i := range r.creds {
		c := &r.creds[i]
		if c.from == nil {
			continue
		}
		// The same secret is enough, as its content may have been renewed; so are
		// the same credentials in another.
		_, same := a.secrets[*c.from]
		for _, h := range a.secrets {
			same = same || h == c.hash()
		}
		if same {
			a.note(c)
			return true
		}
	}
	return false
}

// pulled lists the images whose pulls are remembered.
func (m *Images) pulled() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Keys(m.mu.access))
}

// forgetAccess drops the records of images that are gone.
func (m *Images) forgetAccess(ids ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range ids {
		delete(m.mu.access, id)
	}
}
