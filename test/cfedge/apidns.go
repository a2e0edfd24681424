package cfedge

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"
)

type zoneJSON struct {
	ID      string            `json:"id"`
	Name    string            `json:"name"`
	Status  string            `json:"status"`
	Paused  bool              `json:"paused"`
	Type    string            `json:"type"`
	Account map[string]string `json:"account"`
}

// listZones shows the zones that the token may read: one that it may not is
// left out, and no error says so. Known: the reference, and threads in which a
// token of the wrong zone gets an empty list.
func (a *API) listZones(r *request) reply {
	c := a.cloud
	c.mu.Lock()
	defer c.mu.Unlock()
	all := []zoneJSON{}
	for _, z := range c.zones {
		if name := r.URL.Query().Get("name"); name != "" && name != z.name || !r.token.may("zone", z.name) {
			continue
		}
		all = append(all, zoneJSON{ID: z.id, Name: z.name, Status: z.status, Type: "full", Account: map[string]string{"id": z.account, "name": c.accounts[z.account]}})
	}
	slices.SortFunc(all, func(x, y zoneJSON) int { return strings.Compare(x.Name, y.Name) })
	return page(r, all, 20, 50)
}

// inZone runs a call on records, if the token may.
func (a *API) inZone(r *request, do func(*zoneState) reply) reply {
	c := a.cloud
	c.mu.Lock()
	defer c.mu.Unlock()
	z := c.zones[r.PathValue("zone")]
	permission := "dns"
	if r.Method == http.MethodGet {
		permission = "dns:read"
	}
	if z == nil {
		return refuse(http.StatusNotFound, 7003, "Could not route to "+r.URL.Path+", perhaps your object identifier is invalid?")
	}
	if !r.token.may(permission, z.name) {
		return forbidden
	}
	return do(z)
}

func (a *API) listRecords(r *request) reply {
	a.mu.Lock()
	most := a.most
	a.mu.Unlock()
	return a.inZone(r, func(z *zoneState) reply {
		q := r.URL.Query()
		all := slices.DeleteFunc(z.sorted(), func(r Record) bool {
			return q.Get("type") != "" && r.Type != q.Get("type") || q.Get("name") != "" && r.Name != q.Get("name")
		})
		return page(r, all, 100, most)
	})
}

// one does a single write.
func (a *API) one(r *request, z *zoneState, done RecordWrite, next map[string]Record) reply {
	a.cloud.commit(z, next, []RecordWrite{done}, r.token.name)
	if done.After == nil {
		return result(map[string]string{"id": done.Before.ID})
	}
	return result(done.After)
}

func (a *API) createRecord(r *request) reply {
	return a.inZone(r, func(z *zoneState) reply {
		var record Record
		if !r.decode(&record) {
			return badBody
		}
		record.ID = ""
		next := maps.Clone(z.records)
		done, refused := a.cloud.write(z, next, record)
		if refused != nil {
			return refuse(http.StatusBadRequest, refused.Code, refused.Message)
		}
		return a.one(r, z, done, next)
	})
}

var badBody = refuse(http.StatusBadRequest, 9207, "Request body is invalid.")

func (a *API) getRecord(r *request) reply {
	return a.inZone(r, func(z *zoneState) reply {
		if record, ok := z.records[r.PathValue("record")]; ok {
			return result(record)
		}
		return noRecord
	})
}

var noRecord = refuse(http.StatusNotFound, 81044, "Record does not exist.")

func (a *API) putRecord(r *request) reply   { return a.change(r, false) }
func (a *API) patchRecord(r *request) reply { return a.change(r, true) }

func (a *API) change(r *request, patch bool) reply {
	return a.inZone(r, func(z *zoneState) reply {
		id := r.PathValue("record")
		if _, ok := z.records[id]; !ok {
			return noRecord
		}
		record, ok := changed(z.records, id, r.body, patch)
		if !ok {
			return badBody
		}
		next := maps.Clone(z.records)
		done, refused := a.cloud.write(z, next, record)
		if refused != nil {
			return refuse(http.StatusBadRequest, refused.Code, refused.Message)
		}
		return a.one(r, z, done, next)
	})
}

// changed is a record as a change asks for it: a patch keeps what it does not
// name.
func changed(records map[string]Record, id string, body []byte, patch bool) (Record, bool) {
	var record Record
	if patch {
		record = records[id]
	}
	ok := json.Unmarshal(body, &record) == nil
	record.ID = id
	return record, ok
}

func (a *API) deleteRecord(r *request) reply {
	return a.inZone(r, func(z *zoneState) reply {
		before, ok := z.records[r.PathValue("record")]
		if !ok {
			return noRecord
		}
		next := maps.Clone(z.records)
		delete(next, before.ID)
		return a.one(r, z, RecordWrite{Zone: z.name, Before: &before}, next)
	})
}

// batchRecords does all or nothing, in the order deletes, patches, puts, posts.
// Known: the reference (order, one database transaction) and "Batch record
// changes" (200 records in a free zone); that a refusal undoes the whole batch
// follows from the transaction. The error code of a batch too large is not
// known to us.
func (a *API) batchRecords(r *request) reply {
	return a.inZone(r, func(z *zoneState) reply {
		var asked struct {
			Deletes, Patches, Puts, Posts []json.RawMessage
		}
		if !r.decode(&asked) {
			return badBody
		}
		if n := len(asked.Deletes) + len(asked.Patches) + len(asked.Puts) + len(asked.Posts); n > a.batch {
			return refuse(http.StatusBadRequest, 9207, "Too many records in a batch.")
		}
		next := maps.Clone(z.records)
		var all []RecordWrite
		out := map[string][]any{"deletes": {}, "patches": {}, "puts": {}, "posts": {}}
		for _, step := range []struct {
			verb string
			list []json.RawMessage
		}{{"deletes", asked.Deletes}, {"patches", asked.Patches}, {"puts", asked.Puts}, {"posts", asked.Posts}} {
			for _, text := range step.list {
				var named struct{ ID string }
				if json.Unmarshal(text, &named) != nil {
					return badBody
				}
				before, there := next[named.ID]
				if step.verb != "posts" && !there {
					return noRecord
				}
				if step.verb == "deletes" {
					delete(next, named.ID)
					all = append(all, RecordWrite{Zone: z.name, Before: &before})
					out[step.verb] = append(out[step.verb], before)
					continue
				}
				record, ok := changed(next, named.ID, text, step.verb == "patches")
				if !ok {
					return badBody
				}
				if step.verb == "posts" {
					record.ID = ""
				}
				done, refused := a.cloud.write(z, next, record)
				if refused != nil {
					return refuse(http.StatusBadRequest, refused.Code, refused.Message)
				}
				all = append(all, done)
				out[step.verb] = append(out[step.verb], *done.After)
			}
		}
		a.cloud.commit(z, next, all, r.token.name)
		return result(out)
	})
}
